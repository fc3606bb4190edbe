"""create_agent and its middleware over a worker that answers from a script, choosing by itself (auto)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    ClearToolUsesEdit,
    ContextEditingMiddleware,
    LLMToolSelectorMiddleware,
    ModelRetryMiddleware,
    SummarizationMiddleware,
)
from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage, trim_messages
from pydantic import BaseModel

from langchain_llama_worker import ChatLlamaWorker
from llama_worker import ContextOverflowError, GenerationError, InvalidOutputError, InvalidRequestError, WorkerConfig
from llama_worker.testing import Fault, fake_loader, fake_worker
from tests.adapters.langchain.test_calls import Point, call, pay, weather

QUESTION: Any = {"messages": [{"role": "user", "content": "How is Rome? Then pay bob."}]}
TWO_TOOLS = (call("weather", city="Rome"), call("pay", to="bob", amount=3), "It rains, and bob has three.")


@contextmanager
def chat(*replies: str, **fields: Any) -> Iterator[ChatLlamaWorker]:
    with fake_worker(*replies) as worker:
        yield ChatLlamaWorker(worker=worker, **fields)


def results(state: dict[str, Any]) -> list[str]:
    return [message.text for message in state["messages"] if isinstance(message, ToolMessage)]


def test_an_agent_uses_two_tools_and_answers() -> None:
    with chat(*TWO_TOOLS) as model:
        state = create_agent(model, [weather, pay]).invoke(QUESTION)
    assert results(state) == ["It rains in Rome.", "3 paid to bob."]
    assert state["messages"][-1].text == TWO_TOOLS[-1]


async def test_an_agent_on_an_event_loop_does_the_same() -> None:
    with chat(*TWO_TOOLS) as model:
        state = await create_agent(model, [weather, pay]).ainvoke(QUESTION)
    assert results(state) == ["It rains in Rome.", "3 paid to bob."]


@pytest.mark.parametrize("version", [None, "v1"])
def test_an_agent_tells_its_calls_as_they_are_written(version: str | None) -> None:
    """stream_mode="messages" sends the agent's invocations through the stream."""
    with chat(*TWO_TOOLS, output_version=version) as model:
        agent = create_agent(model, [weather, pay])
        told = [message for message, _ in agent.stream(QUESTION, stream_mode="messages")]  # type: ignore[misc, str-unpack]
    pieces = [piece for m in told if isinstance(m, AIMessageChunk) for piece in m.tool_call_chunks]
    assert [piece["name"] for piece in pieces if piece["name"]] == ["weather", "pay"]
    assert [m.text for m in told if isinstance(m, ToolMessage)] == ["It rains in Rome.", "3 paid to bob."]
    assert "".join(m.text for m in told if isinstance(m, AIMessageChunk)).strip() == TWO_TOOLS[-1]


@pytest.mark.filterwarnings("ignore:.* is in beta", "ignore:.*experimental")
def test_an_agent_tells_its_calls_in_v3_events_as_well() -> None:
    with chat(*TWO_TOOLS) as model:
        run = create_agent(model, [weather, pay]).stream_events(QUESTION, version="v3")
        told = [call["name"] for message in run.messages for call in message.output.tool_calls]
        assert told == ["weather", "pay"]
        assert results(run.output) == ["It rains in Rome.", "3 paid to bob."]


def test_a_selector_of_tools_gets_the_object_that_it_asks_for() -> None:
    with chat('{"tools": ["pay"]}', call("pay", to="bob", amount=3), '{"tools": []}', "Done.") as model:
        agent = create_agent(model, [weather, pay], middleware=[LLMToolSelectorMiddleware(max_tools=1)])
        assert results(agent.invoke(QUESTION)) == ["3 paid to bob."]


def test_two_calls_of_one_reply_are_both_made() -> None:
    with chat(f"{TWO_TOOLS[0]}\n{TWO_TOOLS[1]}", "Done.", parallel_tool_calls=True) as model:
        assert len(results(create_agent(model, [weather, pay]).invoke(QUESTION))) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_that_was_cut_off_is_not_made_and_the_model_is_told(streaming: bool) -> None:
    """LangChain tells it on the next turn, as the result of that call."""
    script = (call("pay", to="bob", amount=1000), "Sorry, I did not pay.")
    with chat(*script, max_tokens=len(script[0]) - 18) as model:
        agent = create_agent(model.model_copy(update={"streaming": True}) if streaming else model, [pay])
        *_, broken = agent.invoke(QUESTION)["messages"]
        state = agent.invoke({"messages": [HumanMessage("Pay bob."), broken, HumanMessage("Did you?")]})
    assert not broken.tool_calls
    assert broken.response_metadata["finish_reason"] == "length"
    [told] = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    assert (told.status, told.tool_call_id) == ("error", broken.invalid_tool_calls[0]["id"])
    assert state["messages"][-1].text == script[1]


# -- structured answers -----------------------------------------------------------------------------


def test_a_tool_strategy_asks_for_a_call_on_every_turn() -> None:
    with chat(call("weather", city="Rome"), call("Point", x=3, y=4)) as model:
        state = create_agent(model, [weather], response_format=ToolStrategy(Point)).invoke(QUESTION)
    assert state["structured_response"] == Point(x=3, y=4)


@pytest.mark.parametrize("strategy", [ProviderStrategy(Point), AutoStrategy(Point), Point], ids=["own", "auto", "raw"])
@pytest.mark.parametrize("tools", [[weather], []], ids=["tools", "no tools"])
def test_a_provider_strategy_gives_calls_or_the_object(strategy: Any, tools: list[Any]) -> None:
    """Auto is the provider's, for the profile says that it enforces formats."""
    script = [call("weather", city="Rome")] if tools else []
    with chat(*script, '{"x": 3, "y": 4}') as model:
        state = create_agent(model, tools, response_format=strategy).invoke(QUESTION)
    assert state["structured_response"] == Point(x=3, y=4)
    assert len(results(state)) == len(tools)


class Tags(BaseModel):
    """Some tags."""

    tags: set[Literal["dry", "wet"]]


def test_a_set_is_checked_when_it_is_whole_where_only_its_schema_is_known() -> None:
    """create_agent passes on the schema alone: that its class would drop doubled members nobody here can know."""
    strategy = ProviderStrategy(Tags)
    with chat('{"tags": ["dry", "wet"]}', '{"tags": ["dry", "dry"]}') as model:
        agent = create_agent(model, [], response_format=strategy)
        assert agent.invoke(QUESTION)["structured_response"] == Tags(tags={"dry", "wet"})
        with pytest.raises(InvalidOutputError, match="uniqueItems"):
            agent.invoke(QUESTION)
        with pytest.raises(InvalidRequestError, match="uniqueItems"):
            create_agent(model, [], response_format=ProviderStrategy(Tags, strict=True)).invoke(QUESTION)


def test_a_set_that_was_told_twice_over_may_be_tried_again() -> None:
    with chat('{"tags": ["dry", "dry"]}', '{"tags": ["dry"]}') as model:
        again = ModelRetryMiddleware(retry_on=(InvalidOutputError,), initial_delay=0)
        agent = create_agent(model, [], response_format=ProviderStrategy(Tags), middleware=[again])
        assert agent.invoke(QUESTION)["structured_response"] == Tags(tags={"dry"})


def test_a_tool_strategy_tells_the_model_of_a_set_that_was_told_twice_over() -> None:
    with chat(call("Tags", tags=["dry", "dry"]), call("Tags", tags=["dry"])) as model:
        state = create_agent(model, [], response_format=ToolStrategy(Tags)).invoke(QUESTION)
    assert state["structured_response"] == Tags(tags={"dry"})
    assert "could not be executed" in results(state)[0]


def test_a_tool_strategy_that_finds_an_error_may_try_again() -> None:
    class Small(Point):
        """A point near the origin."""

        def model_post_init(self, context: Any) -> None:
            if self.x > 9:
                raise ValueError("too far")

    with chat(call("Small", x=30, y=4), call("Small", x=3, y=4)) as model:
        state = create_agent(model, [], response_format=ToolStrategy(Small)).invoke(QUESTION)
    assert (state["structured_response"].x, state["structured_response"].y) == (3, 4)


# -- middleware -------------------------------------------------------------------------------------


def long_history(n: int) -> list[Any]:
    turns = [[HumanMessage(f"Question {i}? " + "x" * 50), AIMessage(f"Answer {i}.")] for i in range(n)]
    return [message for turn in turns for message in turn]


@pytest.mark.parametrize("trigger", [("fraction", 0.02), ("tokens", 400), ("messages", 8)], ids=str)
def test_a_long_history_is_summarized(trigger: Any) -> None:
    """A fraction is one of `max_input_tokens` of the profile."""
    with fake_worker("It was about questions.", "Yes.", n_ctx=20_000) as worker:
        model = ChatLlamaWorker(worker=worker)
        summarize = SummarizationMiddleware(model, trigger=trigger, keep=("messages", 2))
        agent = create_agent(model, [weather], middleware=[summarize])
        state = agent.invoke({"messages": [*long_history(20), HumanMessage("And now?")]})
    assert len(state["messages"]) < 10
    assert "It was about questions." in state["messages"][0].text


def test_reported_usage_counts_for_the_summary() -> None:
    """LangChain trusts it only from a provider that its traces name as well."""
    with fake_worker("Yes.", n_ctx=4096) as worker:
        model = ChatLlamaWorker(worker=worker)
        summarize = SummarizationMiddleware(model, trigger=("tokens", 1000))
        answer = model.invoke("go")
        answer.usage_metadata = {"input_tokens": 4000, "output_tokens": 1, "total_tokens": 4001}
        assert summarize._should_summarize([HumanMessage("go"), answer], 10)


def test_an_overflow_is_the_one_that_langchain_knows() -> None:
    with fake_worker("Yes.", n_ctx=256) as worker, pytest.raises(ContextOverflowError):
        create_agent(ChatLlamaWorker(worker=worker), []).invoke({"messages": long_history(20)})


async def test_old_results_of_tools_are_cleared_by_the_models_own_count() -> None:
    edit = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=300, keep=1)], token_count_method="model")
    script = [*(call("weather", city="Rome" + "!" * 80) for _ in range(4)), "It rains."]
    with chat(*script) as model:
        Watched.seen.clear()
        agent = create_agent(Watched(worker=model.worker), [weather], middleware=[edit])
        state = agent.invoke(QUESTION)
        assert (await agent.ainvoke(QUESTION))["messages"][-1].text == "It rains."
    assert len(results(state)) == 4
    assert max(Watched.seen) > 0


class Watched(ChatLlamaWorker):
    """Counts the cleared results that it is sent."""

    seen: ClassVar[list[int]] = []

    def _chat_call(self, messages: list[Any], *given: Any) -> Any:
        self.seen.append(sum(m.text == "[cleared]" for m in messages if isinstance(m, ToolMessage)))
        return super()._chat_call(messages, *given)


def test_a_history_is_trimmed_by_the_models_own_count() -> None:
    with fake_worker("Yes.") as worker:
        model = ChatLlamaWorker(worker=worker)
        history = long_history(20)
        kept = trim_messages(history, max_tokens=400, token_counter=model, start_on="human")
        assert 0 < model.get_num_tokens_from_messages(kept) <= 400
        assert kept[-1] == history[-1]


@pytest.mark.parametrize("retries", [0, 2])
def test_a_failure_that_may_pass_is_tried_again(retries: int) -> None:
    loader = fake_loader("Yes.", faults=[Fault("sample", GenerationError("a bad moment"), nth=1)])
    retry = ModelRetryMiddleware(max_retries=retries, initial_delay=0, jitter=False, on_failure="error")
    with fake_worker(loader=loader, worker_config=WorkerConfig()) as worker:
        agent = create_agent(ChatLlamaWorker(worker=worker), [], middleware=[retry])
        if retries:
            assert agent.invoke(QUESTION)["messages"][-1].text == "Yes."
        else:
            with pytest.raises(GenerationError):
                agent.invoke(QUESTION)


def test_a_failure_that_stays_is_not_tried_again() -> None:
    retry = ModelRetryMiddleware(max_retries=5, initial_delay=60, on_failure="error")
    with fake_worker("Yes.", n_ctx=256) as worker, pytest.raises(ContextOverflowError):
        create_agent(ChatLlamaWorker(worker=worker), [], middleware=[retry]).invoke({"messages": long_history(20)})
