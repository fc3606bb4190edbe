"""`session_id` of an LLM or of a call is the session of the worker's requests."""

from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import ConfigError, InvalidRequestError, LlamaWorker
from llama_worker.testing import fake_worker

HELLO = [ChatMessage("Hello", role="user")]


@pytest.fixture
def worker():
    with fake_worker() as worker:
        yield worker


def sessions(worker: LlamaWorker) -> set[str | None]:
    """Whose requests had the slots last."""
    loaded = worker._service.loaded
    assert loaded is not None
    return {slot.session for slot in loaded.scheduler.cache.slots if slot.n}


def test_of_a_call(worker: LlamaWorker):
    LlamaWorkerLLM(worker=worker, max_tokens=2).chat(HELLO, session_id="a call's")
    assert sessions(worker) == {"a call's"}


async def test_of_an_llm(worker: LlamaWorker):
    llm = LlamaWorkerLLM(worker=worker, max_tokens=2, session_id="an object's")
    await llm.achat(HELLO)
    llm.complete("Hello")
    [chunk async for chunk in await llm.astream_chat(HELLO)]
    assert sessions(worker) == {"an object's"}
    assert llm.to_dict()["session_id"] == "an object's"


def test_a_call_goes_before_the_llm(worker: LlamaWorker):
    llm = LlamaWorkerLLM(worker=worker, max_tokens=2, session_id="an object's")
    llm.chat(HELLO, session_id="a call's")
    assert sessions(worker) == {"a call's"}
    llm.chat(HELLO, session="by the worker's name")
    assert sessions(worker) == {"by the worker's name"}
    llm.chat(HELLO, session_id=None)
    assert sessions(worker) == {"an object's"}


def test_none_is_required(worker: LlamaWorker):
    LlamaWorkerLLM(worker=worker, max_tokens=2).chat(HELLO)
    assert sessions(worker) == {None}


def test_what_cannot_be_meant_is_refused(worker: LlamaWorker):
    llm = LlamaWorkerLLM(worker=worker)
    for wrong in ("", "x" * 257, 7):
        with pytest.raises(InvalidRequestError, match="session"):
            llm.chat(HELLO, session_id=wrong)
    with pytest.raises(InvalidRequestError, match="session_id"):
        llm.chat(HELLO, session_id="one", session="other")
    with pytest.raises(ConfigError, match="session_id"):
        LlamaWorkerLLM(worker=worker, session_id="")
