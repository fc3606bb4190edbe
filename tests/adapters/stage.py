"""A worker without a model whose every decode a test can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from llama_worker import LlamaWorker, WorkerConfig
from llama_worker.testing import FakeEngine, Gate, fake_loader, fake_worker


@dataclass
class Stage:
    """A worker that serves one request at a time, its engine, and the gate in front of each decode."""

    worker: LlamaWorker
    engine: FakeEngine
    gate: Gate

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Self]:
        gate, engines = Gate(), list[FakeEngine]()
        loader = fake_loader(gate=gate, seen=engines.append)
        config = WorkerConfig(queue_size=64)
        with fake_worker(loader=loader, n_ctx=200_000, n_parallel=1, worker_config=config) as worker:
            yield cls(worker, engines[0], gate)
            gate.open()

    def is_free(self) -> bool:
        """Whether the worker can serve somebody. It could not, had an endless request not been cancelled."""
        self.gate.open()
        self.worker.generate("x", max_tokens=1, timeout=30)
        return self.engine.n_rows < 10_000
