"""Service: everything that the worker thread works with, in one place.

At every instant an accepted request is reachable from exactly one container: the channel, `preparing`
(stale, with the preparer), `renewed` (back from it), the scheduler's waiting or running generations, or
the embedding queue; what is to become of adapters, from `lora_changes`. A request enters the next before it leaves
the last; so whatever is raised at whichever point, the end of the loop finds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from llama_worker._channel import CommandChannel
from llama_worker._commands import ChangeLora, Reload, Request, Transfer, settle
from llama_worker._config import ModelConfig
from llama_worker._disk import Disk
from llama_worker._draft import DraftModel
from llama_worker._embeddings import EmbedQueue
from llama_worker._engine.base import Engine, Loader
from llama_worker._engine_calls import EngineCalls
from llama_worker._generation import Generation
from llama_worker._loader_thread import Launch, LoaderThread
from llama_worker._loading import Loading
from llama_worker._lora_metrics import LoraMeter
from llama_worker._meter import Meter
from llama_worker._preparer import Preparer
from llama_worker._scheduler import Scheduler
from llama_worker._stall import StallWatch
from llama_worker._view import ModelView

State = Literal["loading", "ready", "draining", "unloaded", "closed", "dead"]


@dataclass(slots=True, eq=False)
class Loaded:
    """A model that is being served: its engine, what callers see of it, and who is served.

    `leaving` are the digests of adapters that have no name any more, until nobody runs with them.
    """

    engine: Engine
    view: ModelView
    scheduler: Scheduler
    embeds: EmbedQueue
    leaving: set[str] = field(default_factory=set)
    disk: Disk | None = None
    draft: DraftModel | None = None

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle and not self.embeds

    def abort(self) -> None:
        """End the engine call that runs, if one does. Any thread, never blocks."""
        self.engine.abort_flag.raise_()
        if self.draft is not None:
            self.draft.engine.abort_flag.raise_()

    def close(self) -> None:
        """Let the model go. Every sampler is closed."""
        if self.draft is not None:
            self.draft.close()
        self.engine.close()

    def retire(self, generation: Generation) -> None:
        """The generation was answered: give back its slot and free its sampler."""
        self.scheduler.retire(generation)
        self.close_sampler(generation)

    def close_sampler(self, generation: Generation) -> None:
        sampler, generation.sampler = generation.sampler, None
        if sampler is not None:
            sampler.close()


@dataclass(slots=True, eq=False)
class Change:
    """A model on its way into service: the first, another one, or one that was unloaded.

    `command` is the Reload that asked for it. `failure` says why `config` could not be loaded; then the
    former model is being loaded again. `removals` are of adapters that it is loaded without.
    """

    config: ModelConfig
    command: Reload | None = None
    loading: Loading | None = None
    failure: Exception | None = None
    drain_until: float | None = None
    removals: tuple[ChangeLora, ...] = ()

    @property
    def overlaps(self) -> bool:
        """Whether the new model is loaded while the old one serves."""
        return self.command is not None and self.command.overlap

    def answer(self, error: Exception | None) -> None:
        if self.command is not None:
            self.command.end(error)
        for removal in self.removals:
            settle(removal.answer, error=error)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Service:
    """Everything that the worker thread works with. Other threads only read `state` and the counts."""

    channel: CommandChannel
    loader: Loader
    config: ModelConfig
    step_budget_ms: float
    preparer: Preparer
    publish: Callable[[ModelView | Exception], None]
    clock: Callable[[], float] = time.monotonic
    state: State = "loading"
    loaded: Loaded | None = None
    refusal: Exception | None = None
    change: Change | None = None
    keep_alive: float | None = None
    idle_since: float | None = None
    stalls: StallWatch | None = None
    preparing: list[Request] = field(default_factory=list)
    renewed: list[Request] = field(default_factory=list)
    lora_changes: list[ChangeLora] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    epoch: int = 0
    n_steps: int = 0
    n_aborts: int = 0
    freed: Future[None] = field(default_factory=Future)  # before `ended`, which waits for the disk
    ended: Future[None] = field(default_factory=Future)
    abort: Callable[[], None] | None = None
    launch: Launch = field(default_factory=LoaderThread)
    calls: EngineCalls = field(default_factory=EngineCalls)
    meter: Meter = field(default_factory=Meter)
    loras: LoraMeter = field(default_factory=LoraMeter)

    @property
    def parked(self) -> bool:
        """Whether the worker thread was given up: it may never come back, so nobody may wait for it."""
        return self.calls.abandoned

    @property
    def is_over(self) -> bool:
        """Whether it was closed or died: it will never serve again. Any thread."""
        return self.state in ("closed", "dead")

    def check_open(self, why_closed: Callable[[], Exception]) -> None:
        """Raise what `why_closed` returns when it is over. Any thread."""
        if self.is_over:
            raise why_closed()

    def is_past(self, deadline: float | None) -> bool:
        return deadline is not None and self.clock() >= deadline
