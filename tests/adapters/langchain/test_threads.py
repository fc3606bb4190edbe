"""The thread of a config is the session of the worker's requests, and so is `session_id`."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, MessagesState, StateGraph

from langchain_llama_worker import ChatLlamaWorker
from langchain_llama_worker import LlamaWorkerLLM as CompletionModel
from llama_worker import InvalidRequestError, LlamaWorker

THREAD = {"configurable": {"thread_id": "a thread"}}


def sessions(worker: LlamaWorker) -> set[str | None]:
    """Whose requests had the slots last."""
    loaded = worker._service.loaded
    assert loaded is not None
    return {slot.session for slot in loaded.scheduler.cache.slots if slot.n}


@pytest.fixture(params=[ChatLlamaWorker, CompletionModel])
def model(request: pytest.FixtureRequest, worker: LlamaWorker) -> Any:
    return request.param(worker=worker, max_tokens=2)


async def used(model: Any, how: str, **given: Any) -> None:
    match how:
        case "invoke":
            model.invoke("Hello", **given)
        case "ainvoke":
            await model.ainvoke("Hello", **given)
        case "stream":
            list(model.stream("Hello", **given))
        case "astream":
            [chunk async for chunk in model.astream("Hello", **given)]


WAYS = ["invoke", "ainvoke", "stream", "astream"]


@pytest.mark.parametrize("how", WAYS)
async def test_a_call_with_a_thread_is_of_its_session(model: Any, worker: LlamaWorker, how: str):
    await used(model, how, config=THREAD)
    assert sessions(worker) == {"a thread"}


@pytest.mark.parametrize("how", WAYS)
async def test_so_is_a_call_in_a_chain(model: Any, worker: LlamaWorker, how: str):
    await used(RunnableLambda(lambda text: text) | model, how, config=THREAD)
    assert sessions(worker) == {"a thread"}


async def test_and_one_in_a_graph(worker: LlamaWorker):
    chat = ChatLlamaWorker(worker=worker, max_tokens=2)
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [chat.invoke(state["messages"])]})
    graph.add_edge(START, "model")
    graph.add_edge("model", END)
    graph.compile().invoke({"messages": [("user", "Hello")]}, THREAD)
    assert sessions(worker) == {"a thread"}


async def test_session_id_goes_before_the_thread(model: Any, worker: LlamaWorker):
    model.invoke("Hello", config=THREAD, session_id="a call's")
    assert sessions(worker) == {"a call's"}


async def test_session_id_may_be_a_field(worker: LlamaWorker):
    chat = ChatLlamaWorker(worker=worker, max_tokens=2, session_id="an object's")
    chat.invoke("Hello", config=THREAD)
    assert sessions(worker) == {"an object's"}


async def test_who_has_none_is_asked_for_none(model: Any, worker: LlamaWorker):
    model.invoke("Hello")
    assert sessions(worker) == {None}


@pytest.mark.parametrize("thread", [7, uuid.UUID(int=3), "x" * 5000, "", "\ud800" * 300])
async def test_no_thread_fails_a_call(model: Any, worker: LlamaWorker, thread: Any):
    model.invoke("Hello", config={"configurable": {"thread_id": thread}})
    (session,) = sessions(worker)
    assert (session is None) == (thread == "")
    assert session is None or len(session) <= 256


@pytest.mark.parametrize("wrong", ["", "x" * 257, 7])
async def test_a_session_id_that_cannot_be_meant_is_refused(model: Any, wrong: Any):
    with pytest.raises(InvalidRequestError, match="session"):
        model.invoke("Hello", session_id=wrong)


async def test_a_session_changes_no_answer_and_no_cache_key(worker: LlamaWorker):
    plain, named = (ChatLlamaWorker(worker=worker, session_id=name) for name in (None, "somebody"))
    assert plain._identifying_params == named._identifying_params
