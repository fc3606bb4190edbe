"""A worker without a model whose every decode a test can hold."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from llama_worker import LlamaWorker, WorkerConfig
from llama_worker.testing import FakeEngine, Gate, fake_loader, fake_worker

ENDLESS = {"ignore_eos": True, "max_tokens": 100_000}
"""Keywords of a generation that only a cancel can end in a test's lifetime."""


@dataclass
class Stage:
    """A worker that serves one request at a time, its engine, and the gate in front of each decode."""

    worker: LlamaWorker
    engine: FakeEngine
    gate: Gate

    def is_free(self) -> bool:
        """Whether the worker can serve somebody. It could not, had an endless request not been cancelled."""
        self.gate.open()
        self.worker.generate("x", max_tokens=1, timeout=30)
        return self.engine.n_rows < 10_000


@pytest.fixture
def stage() -> Iterator[Stage]:
    gate, engines = Gate(), list[FakeEngine]()
    loader = fake_loader(gate=gate, seen=engines.append)
    with fake_worker(loader=loader, n_ctx=200_000, n_parallel=1, worker_config=WorkerConfig(queue_size=64)) as worker:
        yield Stage(worker, engines[0], gate)
        gate.open()


@pytest.fixture
def worker() -> Iterator[LlamaWorker]:
    """Answers whatever follows from the prompt, four at a time."""
    with fake_worker(worker_config=WorkerConfig(queue_size=64)) as worker:
        yield worker
