"""What must stay flat, however long it goes on: python -m benchmarks.pathologies [--short] [--only WORK]

    sessions   1,000 sessions ask in turn, over 4 slots: none is ever found in its slot
    starts     1,000 prompts that differ in the first token
    rewritten  one session whose history is summarised in the middle again and again
    context    a context of 32k tokens: what Python takes of a step of 8 rows, after shorter and longer histories

On a synthesised model so small that the bookkeeping shows. Flat: the last tenth of the requests takes, in the median,
at most 1.2 times as long as the first tenth; where one worker is measured, in units of a request that another, idle
worker is asked again and again meanwhile, for the machine itself is not flat. What is saved in RAM in vain must not
cost more than it is worth: the sessions are served in turn by a worker that saves nothing, one whose RAM holds a few
and one with the default.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks import workload
from benchmarks.contestants.ours import Worker
from benchmarks.contestants.token_cost import ROWS, cost, watching
from benchmarks.flat import Found, end_over_beginning, report
from llama_worker import LlamaWorker, ModelConfig
from tests import synth

FLAT: Final = 1.2
STEP_US: Final = 300.0
GREEDY: Final = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 4}
RAM: Final = {"saving nothing": 0, "RAM for a few": 1, "RAM by default": 512}


def sessions(folder: Path, *, short: bool) -> list[Found]:
    """Every session asks twice and more; nobody comes back before all others have asked."""
    n_sessions, n_turns = (200, 3) if short else (1000, 4)
    histories = [workload.story(40, seed=number) for number in range(n_sessions)]
    took: dict[str, list[float]] = {name: [] for name in RAM}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(folder, n_ctx=4096, n_parallel=4, cache_ram=ram))
            for name, ram in RAM.items()
        }
        for turn in range(n_turns):
            for history in histories:
                for name, worker in workers.items():
                    took[name].append(_seconds(worker, f"{history} question {turn}"))
        hits = {name: worker.cache_metrics().saved_hits for name, worker in workers.items()}
    # Until the first round is over everything is new: it is no part of what a session costs that comes back.
    later = {name: seconds[n_sessions:] for name, seconds in took.items()}
    nothing = mean(later["saving nothing"])
    flat = [
        Found(
            text=f"{n_sessions} sessions in turn, {name}: end / beginning", value=end_over_beginning(all), at_most=FLAT
        )
        for name, all in later.items()
    ]
    against = [
        Found(
            text=f"{n_sessions} sessions in turn, {name} / saving nothing ({hits[name]} came back)",
            value=mean(later[name]) / nothing,
            at_most=1.05,
        )
        for name in list(RAM)[1:]
    ]
    return [*flat, *against]


def starts(folder: Path, *, short: bool) -> list[Found]:
    n = 200 if short else 1000
    with _worker(folder, n_ctx=4096, n_parallel=4) as worker, _worker(folder, n_ctx=4096) as idle:
        took = [_seconds(worker, workload.story(40, seed=20_000 + number)) / _unit(idle) for number in range(n)]
    return [
        Found(text=f"{n} prompts with nothing in common: end / beginning", value=end_over_beginning(took), at_most=FLAT)
    ]


def rewritten(folder: Path, *, short: bool) -> list[Found]:
    """Every fifth turn the older half of the history becomes one summary, so it stays about as long."""
    n_turns = 60 if short else 400
    system = {"role": "system", "content": workload.story(60, seed=1)}
    history: list[dict[str, str]] = []
    took = []
    with _worker(folder, n_ctx=4096, n_parallel=4) as worker, _worker(folder, n_ctx=4096) as idle:
        for turn in range(n_turns):
            history.append({"role": "user", "content": workload.story(20, seed=30_000 + turn)})
            if turn % 5 == 4 and len(history) > 12:
                summary = {"role": "user", "content": "summary: " + workload.story(20, seed=40_000 + turn)}
                history[: len(history) // 2] = [summary, {"role": "assistant", "content": "noted"}]
            begun = time.perf_counter()
            reply = worker.generate([system, *history], **GREEDY)
            took.append((time.perf_counter() - begun) / _unit(idle))
            history.append({"role": "assistant", "content": reply.text})
        ratio = worker.cache_metrics().reuse_ratio or 0.0
    steady = took[20:]
    return [
        Found(
            text=f"{n_turns} turns, the middle rewritten: end / beginning",
            value=end_over_beginning(steady),
            at_most=FLAT,
        ),
        Found(text="  share of the prompts that was computed", value=1 - ratio),
    ]


def context(folder: Path, *, short: bool) -> list[Found]:
    """Microseconds of a step of 8 rows without llama.cpp's calls: as one waits for it, and of the thread's CPU time.

    From about 2,000 tokens on, a decode of this model reads more than the CPU's second cache holds, and Python goes on
    with cold caches; so that is the history that a long one is held against. A short one is shown beside it.
    """
    n_tokens, watch = (6_000 if short else 30_000), watching()
    lengths = {"50": 50, "2,000": 2_000, f"{n_tokens:,}": n_tokens}
    clocks = {"wall": time.perf_counter, "CPU": time.thread_time}
    found: dict[tuple[str, str], list[float]] = {(clock, length): [] for clock in clocks for length in lengths}
    with _worker(folder, n_ctx=32_768, n_parallel=ROWS, n_kv_cells=32_768) as worker:
        per_word = worker.count_tokens(workload.story(100, seed=2)) / 100
        complete = Worker(worker).whole
        for turn in range(1 if short else 3):
            for clock, now in clocks.items():
                for length, n in lengths.items():
                    prompt = workload.story(int(n / per_word), seed=100 * turn + n)
                    found[clock, length].append(ROWS * cost(watch(now), complete, prompt))
    step = {key: median(times) for key, times in found.items()}
    return [
        *(
            Found(
                text=f"a step of {ROWS} rows, Python's {clock} time after {length} tokens",
                value=step[clock, length],
                at_most=STEP_US if (clock, n) == ("wall", n_tokens) else None,
                unit="µs",
            )
            for clock in clocks
            for length, n in lengths.items()
        ),
        *(
            Found(
                text=f"a step of {ROWS} rows, Python's {clock} time: {n_tokens:,} / 2,000 tokens",
                value=step[clock, f"{n_tokens:,}"] / step[clock, "2,000"],
                at_most=FLAT,
            )
            for clock in clocks
        ),
    ]


@contextmanager
def _worker(folder: Path, **settings: Any) -> Iterator[LlamaWorker]:
    path = folder / "tiny.gguf"
    if not path.exists():
        synth.llama(path, n_ctx=32_768)
    with LlamaWorker(ModelConfig(model=str(path), n_threads=1, **settings)) as worker:
        worker.generate("hello", **GREEDY)
        yield worker


def _seconds(worker: LlamaWorker, prompt: str) -> float:
    begun = time.perf_counter()
    worker.generate(prompt, **GREEDY)
    return time.perf_counter() - begun


def _unit(idle: LlamaWorker) -> float:
    """Seconds of a request that always is the same work."""
    return _seconds(idle, "how long does it take now?")


WORKS: Final[dict[str, Callable[..., list[Found]]]] = {
    "sessions": sessions,
    "starts": starts,
    "rewritten": rewritten,
    "context": context,
}


def main() -> int:
    """1 when something is not flat."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pathologies", description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a fraction of each: does everything run?")
    parser.add_argument("--only", choices=WORKS, help="one of them")
    given = parser.parse_args()
    status = 0
    with TemporaryDirectory() as folder:
        for name in [given.only] if given.only else WORKS:
            status |= report(WORKS[name](Path(folder), short=given.short))
    return status


if __name__ == "__main__":
    sys.exit(main())
