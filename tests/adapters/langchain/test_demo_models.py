"""What only the real engine can show."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from llama_worker import close_all, inspect_model

pytestmark = pytest.mark.engine
# One thread: more of them wait for each other where the cores are shared.
MODEL: dict[str, Any] = {"model": "demo://smollm2-135m-instruct", "n_ctx": 2048, "n_threads": 1}


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[ChatLlamaWorker]:
    """A share that stays, so that not each test loads its own."""
    yield ChatLlamaWorker(**MODEL)
    close_all()


def test_each_turn_of_a_chat_is_prefilled_only_where_it_is_new() -> None:
    """Also at a temperature at which six of eight replies tokenize otherwise than they were sampled."""
    chat = ChatLlamaWorker(**MODEL, temperature=1.2, seed=11, max_tokens=40)
    history: list[BaseMessage] = [SystemMessage("You are a sailor who likes to talk.")]
    before = 0
    for turn in range(6):
        history.append(HumanMessage(f"Tell me a short story, number {turn}."))
        reply = chat.invoke(history)
        history.append(AIMessage(reply.text))
        usage = reply.usage_metadata
        assert usage is not None
        assert usage["input_token_details"]["cache_read"] >= before - 8
        before = usage["total_tokens"]


def test_the_three_classes_share_one_model() -> None:
    chat = ChatLlamaWorker(**MODEL, max_tokens=4, temperature=0)
    llm = LlamaWorkerLLM(**MODEL, max_tokens=4, temperature=0)
    assert chat._connect() is llm._connect()
    assert chat.invoke("Hello").text
    assert llm.invoke("Hello")


@tool
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


@tool
def pay(to: Literal["bob", "ann"], amount: int) -> str:
    """Pays somebody an amount."""
    return f"{amount} paid to {to}."


class Answer(BaseModel):
    """What was done."""

    city: Literal["Rome", "Oslo"]
    paid: bool


@wrap_model_call
def in_turn(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    """One tool, then the other, then words: so small a model decides nothing."""
    n = sum(isinstance(message, ToolMessage) for message in request.messages)
    return handler(
        request.override(tool_choice=["weather", {"type": "function", "function": {"name": "pay"}}, "none"][n])
    )


TASK: Any = {"messages": [HumanMessage("How is the weather in Rome? Pay bob 3.")]}


def test_an_agent_completes_a_task_with_two_tools_that_it_is_made_to_use() -> None:
    agent = create_agent(ChatLlamaWorker(**MODEL, temperature=0, max_tokens=64), [weather, pay], middleware=[in_turn])
    messages = agent.invoke(TASK)["messages"]
    assert [m.name for m in messages if isinstance(m, ToolMessage)] == ["weather", "pay"]
    assert [m.status for m in messages if isinstance(m, ToolMessage)] == ["success", "success"]
    assert messages[-1].text
    assert not messages[-1].tool_calls


@pytest.mark.parametrize("strategy", [ToolStrategy, ProviderStrategy, AutoStrategy])
async def test_an_agent_answers_with_an_object(strategy: Any) -> None:
    model = ChatLlamaWorker(**MODEL, temperature=0, max_tokens=64)
    state = await create_agent(model, [], response_format=strategy(Answer)).ainvoke(TASK)
    assert isinstance(state["structured_response"], Answer)


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("choice", ["any", "pay", "none"])
def test_an_answer_is_the_same_streamed_or_not(choice: str, version: str | None) -> None:
    model = ChatLlamaWorker(**MODEL, temperature=0, max_tokens=48, output_version=version)
    bound = model.bind_tools([weather, pay], tool_choice=choice)
    bound.invoke("Pay bob 3.")  # a cold prompt is computed in other batches, and may be answered in other words
    invoked, chunks = bound.invoke("Pay bob 3."), list(bound.stream("Pay bob 3."))
    streamed: Any = chunks[0] + chunks[1:]  # type: ignore[operator]
    assert streamed.text == invoked.text
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(c["name"], c["args"]) for c in invoked.tool_calls]
    assert bool(invoked.tool_calls) == (choice != "none")
    assert streamed.response_metadata == invoked.response_metadata
    assert streamed.usage_metadata["total_tokens"] == invoked.usage_metadata["total_tokens"]  # type: ignore[index]
    counted = model.get_num_tokens_from_messages([HumanMessage("Pay bob 3.")], [weather, pay])
    assert counted == invoked.usage_metadata["input_tokens"]  # type: ignore[index]


@pytest.mark.parametrize("max_tokens", [8, 16, 24])
def test_a_call_that_max_tokens_cut_off_is_none(max_tokens: int) -> None:
    bound = ChatLlamaWorker(**MODEL, temperature=0, max_tokens=max_tokens).bind_tools([pay], tool_choice="any")
    chunks = list(bound.stream("Pay bob 3."))
    streamed: Any = chunks[0] + chunks[1:]  # type: ignore[operator]
    for answer in (bound.invoke("Pay bob 3."), streamed):
        if answer.response_metadata["finish_reason"] == "length":
            assert answer.tool_calls == []
        for call in answer.tool_calls:
            assert set(call["args"]) == {"to", "amount"}


def test_the_profile_comes_from_the_header_and_the_settings() -> None:
    profile = ChatLlamaWorker(model=MODEL["model"], n_ctx=0).profile
    assert profile is not None
    assert profile["max_input_tokens"] == inspect_model(MODEL["model"]).n_ctx_train
    assert profile["name"] == inspect_model(MODEL["model"]).name


def test_embeddings_know_what_is_alike() -> None:
    model = LlamaWorkerEmbeddings(model="demo://all-minilm-l6-v2", n_threads=1)
    sea, ship, tax = model.embed_documents(["the sea and its waves", "a ship on the ocean", "income tax forms"])
    assert _dot(sea, ship) > _dot(sea, tax) + 0.1


def _dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
