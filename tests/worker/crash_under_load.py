"""A process whose worker crashes in native code while it is busy: `KIND MODEL contain|leave`.

Prints one JSON object: how each caller ended and how many seconds after the crash, and what came afterwards.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llama_worker import LlamaWorker, ModelConfig, WorkerConfig
from llama_worker._engine.base import DecodeStatus, LoadedModel, Span
from llama_worker._engine.library import library
from llama_worker._engine.llama import LlamaEngine, load
from tests.worker.waiting import wait_until


def failed_assertion(engine: LlamaEngine) -> None:
    """In a call that releases the GIL."""
    _sample_a_row_without_logits(engine, library().api.llama_sampler_sample)


def failed_assertion_with_the_gil(engine: LlamaEngine) -> None:
    _sample_a_row_without_logits(engine, library().short.llama_sampler_sample)


def uncaught_exception(engine: LlamaEngine) -> None:
    """std::out_of_range."""
    library().api.llama_vocab_get_text(library().api.llama_model_get_vocab(engine._model), 10**6)


def failed_assertion_on_a_native_thread(engine: LlamaEngine) -> None:
    """As on a thread of ggml's: the caller waits for it at a barrier and looks at no abort flag."""
    crash = ctypes.cast(library().api._lib["ggml_backend_buft_name"], ctypes.c_void_p)
    thread = ctypes.c_ulong()
    assert ctypes.CDLL(None).pthread_create(ctypes.byref(thread), None, crash, None) == 0
    threading.Event().wait()


def _sample_a_row_without_logits(engine: LlamaEngine, sample: Callable[..., int]) -> None:
    generator = engine._generator
    assert generator is not None
    sample(library().api.llama_sampler_init_greedy(), generator.context, 0)


KINDS: dict[str, Callable[[LlamaEngine], None]] = {
    crash.__name__: crash
    for crash in (
        failed_assertion,
        failed_assertion_with_the_gil,
        uncaught_exception,
        failed_assertion_on_a_native_thread,
    )
}


class CrashingEngine:
    """The real engine until `armed`; then its next decode crashes."""

    def __init__(self, inner: LlamaEngine, crash: Callable[[LlamaEngine], None]) -> None:
        self.inner = inner
        self.crash = crash
        self.armed = threading.Event()
        self.crashed_at = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        if self.armed.is_set():
            self.inner.decode([span._replace(output=False) for span in spans])
            self.crashed_at = time.monotonic()
            self.crash(self.inner)
        return self.inner.decode(spans)


class Callers:
    """Everyone who waits, each in a thread of its own."""

    def __init__(self) -> None:
        self.ends: dict[str, tuple[str, float]] = {}
        self.threads: list[threading.Thread] = []

    def call(self, name: str, task: Callable[[], object]) -> None:
        def run() -> None:
            try:
                end = type(task()).__name__
            except Exception as exc:  # noqa: BLE001  it is what the test is about
                end = f"{type(exc).__name__}: {exc}"
            self.ends[name] = (end, time.monotonic())

        self.threads.append(threading.Thread(target=run, name=name, daemon=True))
        self.threads[-1].start()

    def join(self) -> None:
        until = time.monotonic() + 20
        for thread in self.threads:
            thread.join(max(until - time.monotonic(), 0))


def occupy(worker: LlamaWorker, callers: Callers) -> None:
    """Callers that run, that wait in the channel and before it, for text and for embeddings; at last a reload."""
    long: dict[str, Any] = {"max_tokens": 3900, "ignore_eos": True}
    for i in range(13):
        callers.call(f"generate {i}", lambda i=i: worker.generate(f"prompt {i}", **long))  # type: ignore[misc]
    wait_until(lambda: worker.status().running == 4 and worker.status().callers_waiting >= 1)
    for i in range(2):
        callers.call(f"agenerate {i}", lambda i=i: asyncio.run(worker.agenerate(f"async {i}", **long)))  # type: ignore[misc]
        callers.call(f"embed {i}", lambda i=i: worker.embed([f"text {i}"] * 3))  # type: ignore[misc]
    wait_until(lambda: worker.status().callers_waiting >= 5)
    callers.call("reload", lambda: worker.reload(n_ctx=2048))
    wait_until(lambda: worker.status().state == "draining")


def main(kind: str, model: str, contain: str) -> None:
    engines: list[CrashingEngine] = []

    def crashing(config: ModelConfig) -> LoadedModel:
        loaded = load(config)
        assert isinstance(loaded.engine, LlamaEngine)
        engines.append(CrashingEngine(loaded.engine, KINDS[kind]))
        return replace(loaded, engine=engines[-1])  # type: ignore[arg-type]

    config = ModelConfig(model=model, n_ctx=16384, n_parallel=4, n_threads=1)
    settings = WorkerConfig(queue_size=4, contain_crashes=contain == "contain")
    worker = LlamaWorker(config, settings, loader=crashing)
    callers = Callers()
    occupy(worker, callers)
    engines[0].armed.set()
    callers.join()
    worker.close()
    fresh = LlamaWorker(config, settings)
    reply = fresh.generate("afterwards", max_tokens=8, ignore_eos=True)
    report = {
        "callers": len(callers.threads),
        "ends": {name: (end, at - engines[0].crashed_at) for name, (end, at) in callers.ends.items()},
        "state": worker.status().state,
        "running": worker.status().running,
        "afterwards": reply.usage.completion_tokens,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
