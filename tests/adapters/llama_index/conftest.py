"""Workers without a model, and what the callback decorators of LlamaIndex report."""

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import LlamaWorker
from llama_worker.testing import fake_worker
from tests.adapters import stage

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


class Stage(stage.Stage):
    """As for LangChain, and with an LLM."""

    def endless(self, **fields: Any) -> LlamaWorkerLLM:
        """An LLM whose every reply only a cancel can end in a test's lifetime."""
        return LlamaWorkerLLM(worker=self.worker, ignore_eos=True, max_tokens=100_000, **fields)

    async def becomes_free(self) -> bool:
        """The same for async tests, whose loop has to turn."""
        self.gate.open()
        await self.worker.agenerate("x", max_tokens=1, timeout=30)
        return self.engine.n_rows < 10_000


@pytest.fixture(name="stage")
def _stage() -> Iterator[Stage]:
    with Stage.opened() as opened:
        yield opened


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
