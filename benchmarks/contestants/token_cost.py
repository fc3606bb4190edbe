"""What Python costs per token: the time between llama.cpp's calls, 8 sequences, after short and long prompts.

This is the one script that looks behind the public names: it times `llama_decode` and the sampler where
llama-worker (or `Llama`) calls them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeAlias

import llama_cpp.llama_cpp as bindings

from benchmarks import drive, workload
from benchmarks.contestants.command import main
from benchmarks.drive import Figures

ROWS, N_TOKENS, N_CTX = 8, 129, 8192
SHORT_WORDS, LONG_WORDS = 16, 3000

Clock: TypeAlias = Callable[[], float]


class Stopwatch:
    """Times what lies between the calls of a decode loop, by `clock`; the sampler's time is taken off."""

    def __init__(self, rows: int, clock: Clock) -> None:
        self._rows = rows
        self._clock = clock
        self._sampling = 0.0
        self._left: float | None = None
        self._steps: list[float] = []

    def _enter(self, rows: int) -> None:
        if self._left is not None and rows == self._rows:
            self._steps.append(self._clock() - self._left - self._sampling)

    def _leave(self, rows: int) -> None:
        self._sampling = 0.0
        self._left = self._clock() if rows == self._rows else None

    def decode(self, call: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
        def timed(context: Any, batch: Any) -> int:
            rows = batch.n_tokens
            self._enter(rows)
            status = call(context, batch)
            self._leave(rows)
            return status

        return timed

    def sample(self, call: Callable[..., int]) -> Callable[..., int]:
        def timed(*arguments: Any) -> int:
            entered = self._clock()
            token = call(*arguments)
            self._sampling += self._clock() - entered
            return token

        return timed

    def microseconds_per_token(self) -> float:
        """Of the median step: one that the operating system interrupted says nothing about Python."""
        cost = median(self._steps) / self._rows * 1e6
        self._steps.clear()
        return cost


def watching() -> Callable[[Clock], Stopwatch]:
    """Makes stopwatches over llama.cpp's calls; each takes the place of the one before."""
    from llama_worker._engine.library import library
    from llama_worker._engine.rows import RowScan

    lib = library()
    originals = bindings.llama_decode, lib.short.llama_sampler_sample, RowScan.greatest

    def watch(clock: Clock) -> Stopwatch:
        stopwatch = Stopwatch(ROWS, clock)
        decode, sample, greatest = originals
        bindings.llama_decode = stopwatch.decode(decode)
        lib.short.llama_sampler_sample = stopwatch.sample(sample)
        RowScan.greatest = stopwatch.sample(greatest)
        return stopwatch

    return watch


def ours(model: str, threads: str) -> Figures:
    from benchmarks.contestants.ours import Worker
    from llama_worker import LlamaWorker, ModelConfig

    watch = watching()
    with LlamaWorker(ModelConfig(model=model, n_threads=int(threads), n_ctx=N_CTX, n_parallel=ROWS)) as worker:
        client = Worker(worker)
        return {
            f"{length}{name}_us": cost(watch(clock), complete, workload.story(words, seed=1))
            for length, words in (("short", SHORT_WORDS), ("long", LONG_WORDS))
            for name, clock, complete in (
                ("", time.perf_counter, client.complete),
                ("_whole", time.perf_counter, client.whole),
                ("_cpu", time.thread_time, client.complete),
            )
        }


def cost(watch: Stopwatch, complete: drive.Complete, prompt: str) -> float:
    """Microseconds per token of eight streams that share `prompt` but for its end, so that it is decoded once."""
    drive.listen(complete(prompt, 1), 1)
    prompts = [f"{prompt} {workload.story(8, seed=10 + row)}" for row in range(ROWS)]
    drive.in_threads([lambda text=text: drive.listen(complete(text, N_TOKENS), N_TOKENS) for text in prompts])
    return watch.microseconds_per_token()


def llama(model: str, threads: str) -> Figures:
    """llama-cpp-python's `Llama`, one sequence."""
    from llama_cpp import Llama

    bindings.llama_vocab_is_eog = lambda vocab, token: False
    watch = Stopwatch(1, time.perf_counter)
    bindings.llama_decode = watch.decode(bindings.llama_decode)
    bindings.llama_sampler_sample = watch.sample(bindings.llama_sampler_sample)
    client = Llama(model, n_ctx=N_CTX, n_threads=int(threads), verbose=False)
    figures: Figures = {}
    for name, words in (("short", SHORT_WORDS), ("long", LONG_WORDS)):
        for _ in client(workload.story(words, seed=1), max_tokens=N_TOKENS, temperature=0.0, stream=True):
            pass
        figures[f"{name}_us"] = watch.microseconds_per_token()
    return figures


if __name__ == "__main__":
    main({"token_cost": ours, "token_cost_llama": llama})
