"""Status: a worker at one moment, at a glance."""

from __future__ import annotations

from dataclasses import dataclass

from llama_worker._service import Service, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A snapshot of a worker, taken without waiting for it.

    `queued` requests are in the channel, `waiting` have no slot yet, `running` are being served,
    `callers_waiting` could not be accepted yet. `epoch` counts successful loads.
    """

    state: State
    model: str
    epoch: int
    queued: int
    callers_waiting: int
    waiting: int
    running: int
    embedding: int
    steps: int
    aborts: int
    cells_used: int
    cells: int


def status_of(service: Service, model: str, *, inherited: bool = False) -> Status:
    """The status now; `model` is its name as long as none is loaded. Any thread.

    `inherited`: this process is a forked child, where nobody is served.
    """
    # A parked thread keeps what it had: nobody is served by it.
    loaded = None if service.parked else service.loaded
    return Status(
        state="closed" if inherited else service.state,
        model=model if loaded is None else loaded.view.info.name,
        epoch=service.epoch,
        queued=service.channel.queued,
        callers_waiting=service.channel.waiting,
        waiting=0 if loaded is None else len(loaded.scheduler.waiting),
        running=0 if loaded is None else len(loaded.scheduler.running),
        embedding=0 if loaded is None else len(loaded.embeds),
        steps=service.n_steps,
        aborts=service.n_aborts,
        cells_used=0 if loaded is None else loaded.scheduler.cache.cells.used,
        cells=0 if loaded is None else loaded.scheduler.cache.cells.n,
    )
