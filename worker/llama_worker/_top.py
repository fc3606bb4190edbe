"""`python -m llama_worker top`: the exported workers of this user, one line each, live or once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llama_worker._errors import LlamaWorkerError, UnsupportedFeatureError
from llama_worker._exporter import check_platform, folder, poll
from llama_worker._metrics import Distribution

if TYPE_CHECKING:
    from rich.table import Table

State: TypeAlias = Mapping[str, Any]

HEADINGS = (
    *("pid", "model", "health", "run", "wait", "queue", "cells", "reuse"),
    *("tok/s", "prefill/s", "TTFT", "p95", "per token", "done", "failed"),
)
_SPARED = ("prefill/s", "p95", "queue", "cells", "per token", "pid", "reuse", "done", "TTFT", "wait")
"""What a narrow terminal does without, the least needed first."""
_WIDE = 160  # columns of a frame that no terminal limits


def top(path: str | None, *, once: bool, interval: float) -> None:
    """Show what is exported at `path`, or all of it, until Ctrl-C; `once` prints one frame and returns.

    Raises UnsupportedFeatureError without rich, and LlamaWorkerError when nothing is exported.
    """
    check_platform("top")
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise UnsupportedFeatureError("top", "it needs rich: pip install 'llama-worker[top]'") from None
    console, states = Console(), look(path)
    if not console.is_terminal:
        console = Console(width=_WIDE)
    if once:
        console.print(frame({}, states, 0.0, console.width))
        return
    with Live(frame({}, states, 0.0, console.width), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            before, states = states, look(path)
            live.update(frame(before, states, interval, console.width), refresh=True)


def look(path: str | None) -> dict[Path, State]:
    """Poll one socket, or every one in the user's folder; those of ended processes are passed over."""
    states: dict[Path, State] = {}
    for socket in [Path(path)] if path is not None else sorted(folder().glob("*.sock")):
        with suppress(OSError):
            states[socket] = poll(socket)
    if not states:
        where = str(folder()) if path is None else path
        raise LlamaWorkerError(f"no worker is exported at {where}; call worker.export() in the process that has one")
    return states


def frame(before: Mapping[Path, State], states: Mapping[Path, State], seconds: float, width: int) -> Table:
    """One line for each worker, in `width` columns; rates are those of the last `seconds` where there is a state
    from before."""
    from rich.table import Table

    lines = [HEADINGS, *(row(state, before.get(path), seconds) for path, state in states.items())]
    kept = fitting(lines, width)
    headings, *rows = [[line[column] for column in kept] for line in lines]
    table = Table(*headings, box=None, padding=(0, 1, 0, 0))
    for cells in rows:
        table.add_row(*cells)
    for state in states.values():
        if state["health"]["reason"]:
            table.caption = f"{table.caption or ''}{state['pid']}: {state['health']['reason']}\n"
    return table


def fitting(lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns of `lines`, whose first has the headings, that can be shown whole in `width` characters."""
    kept = list(range(len(HEADINGS)))
    for spared in _SPARED:
        if sum(1 + max(len(line[column]) for line in lines) for column in kept) <= width:
            break
        kept.remove(HEADINGS.index(spared))
    return kept


def row(state: State, before: State | None, seconds: float) -> list[str]:
    metrics, cache, health = state["metrics"], state["cache"], state["health"]
    first, between = _distribution(metrics["time_to_first_token"]), _distribution(metrics["inter_token"])
    answered = [*metrics["finished"].values(), metrics["embeds"]]
    failed = [*metrics["failed"].values(), *metrics["embeds_failed"].values()]
    return [
        str(state["pid"]),
        state["model"],
        health["verdict"] if health["state"] == "ready" else f"{health['verdict']} ({health['state']})",
        str(state["running"] + state["embedding"]),
        str(state["waiting"]),
        str(metrics["queued"]),
        _share(cache["used"], cache["cells"]),
        _share(cache["reused_tokens"], cache["prompt_tokens"]),
        _rate("decode", metrics, before, seconds),
        _rate("prefill", metrics, before, seconds),
        _milliseconds(first.quantile(0.5)),
        _milliseconds(first.quantile(0.95)),
        _milliseconds(between.quantile(0.5)),
        str(sum(answered)),
        str(sum(failed)),
    ]


def _rate(kind: str, metrics: Mapping[str, Any], before: State | None, seconds: float) -> str:
    """Tokens a second: of the last moments, or, in the first frame, of the time in which there were any."""
    tokens, spent = metrics[f"{kind}_tokens"], metrics[f"{kind}_seconds"]
    if before is not None:
        tokens, spent = tokens - before["metrics"][f"{kind}_tokens"], seconds
    return _short(tokens / spent) if spent else "-"


def _distribution(values: Mapping[str, Any]) -> Distribution:
    counts: Sequence[int] = values["counts"]
    bounds: Iterable[float] = values["bounds"]
    return Distribution(tuple(counts), values["sum"], tuple(bounds))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{_short(seconds * 1000)} ms"


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"
