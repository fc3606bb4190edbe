"""Workers without a model, and what the callback decorators of LlamaIndex report."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import LlamaWorker, WorkerConfig
from llama_worker.testing import FakeEngine, Gate, fake_loader, fake_worker

HELLO = [ChatMessage("Hello", role="user")]


class Recorder(BaseCallbackHandler):
    """Keeps every payload, as debug handlers do."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.starts: list[tuple[CBEventType, dict[Any, Any]]] = []
        self.ends: list[tuple[CBEventType, dict[Any, Any]]] = []

    def on_event_start(self, event_type: CBEventType, payload: Any = None, event_id: str = "", **_: Any) -> str:
        self.starts.append((event_type, payload or {}))
        return event_id

    def on_event_end(self, event_type: CBEventType, payload: Any = None, event_id: str = "", **_: Any) -> None:
        self.ends.append((event_type, payload or {}))

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None) -> None: ...


@dataclass
class Stage:
    """A worker that serves one request at a time, its engine, and the gate in front of each decode."""

    worker: LlamaWorker
    engine: FakeEngine
    gate: Gate

    def endless(self, **fields: Any) -> LlamaWorkerLLM:
        """An LLM whose every reply only a cancel can end in a test's lifetime."""
        return LlamaWorkerLLM(worker=self.worker, ignore_eos=True, max_tokens=100_000, **fields)

    def is_free(self) -> bool:
        """Whether the worker can serve somebody. It could not, had an endless request not been cancelled."""
        self.gate.open()
        self.worker.generate("x", max_tokens=1, timeout=30)
        return self.engine.n_rows < 10_000

    async def becomes_free(self) -> bool:
        """The same for async tests, whose loop has to turn."""
        self.gate.open()
        await self.worker.agenerate("x", max_tokens=1, timeout=30)
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
    """Answers "Hi there!" to everybody."""
    with fake_worker("Hi there!") as worker:
        yield worker


@pytest.fixture
def llm(worker: LlamaWorker) -> LlamaWorkerLLM:
    return LlamaWorkerLLM(worker=worker)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
