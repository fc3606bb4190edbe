"""Agents and workflows of LlamaIndex on a scripted model: what core's own tests claim of them, and cancellation.

Core's tests put ready-made messages into the agents; here a worker writes them and the adapter reads them.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from llama_index.core.agent.workflow import (
    AgentInput,
    AgentOutput,
    AgentStream,
    AgentStreamStructuredOutput,
    AgentWorkflow,
    CodeActAgent,
    FunctionAgent,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.base.llms.types import ChatMessage, ThinkingBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context, HumanResponseEvent, InputRequiredEvent
from llama_index.core.workflow.errors import WorkflowCancelledByUser, WorkflowRuntimeError, WorkflowTimeoutError
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import cancel_scope
from llama_worker.testing import fake_loader, fake_worker

from .conftest import Recorder, Stage
from .scripts import SONG, TEMPLATE, Song, call, scripted, thought

# The workflow engine looks at every attribute of an agent, deprecated ones of pydantic included, and the
# agents call deprecated methods of the workflow engine.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

streamed_or_not = pytest.mark.parametrize("streaming", [True, False])


def weigh(animal: str) -> str:
    """How heavy an animal is, in kg."""
    return "80"


def price(kg: int) -> str:
    """What so many kg cost."""
    return f"{kg * 5} coins"


WEIGH, PRICE = call("weigh", animal="sheep"), call("price", kg=80)
QUESTION = "What does a sheep cost?"


def memory_of(llm: LlamaWorkerLLM) -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(llm=llm, tokenizer_fn=llm.tokenizer())


async def seen(run: Any) -> list[Any]:
    return [event async for event in run.stream_events()]


def of_type(events: list[Any], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# -- one agent ----------------------------------------------------------------------------------------------------


@streamed_or_not
async def test_an_agent_answers(streaming: bool) -> None:
    with scripted("Hello.") as llm:
        assert str(await FunctionAgent(llm=llm, streaming=streaming).run(user_msg="Hello")) == "Hello."


@streamed_or_not
async def test_an_agent_completes_a_task_with_two_tools(streaming: bool) -> None:
    """The model decides by itself: two calls, each of whose results it needs, then the answer."""
    with scripted(thought("First its weight.", WEIGH), f"Now the price.\n{PRICE}", "400 coins.") as llm:
        memory = memory_of(llm)
        run = FunctionAgent(tools=[weigh, price], llm=llm, streaming=streaming).run(user_msg=QUESTION, memory=memory)
        results, output = of_type(await seen(run), ToolCallResult), await run
    assert [(r.tool_name, r.tool_kwargs, str(r.tool_output)) for r in results] == [
        ("weigh", {"animal": "sheep"}, "80"),
        ("price", {"kg": 80}, "400 coins"),
    ]
    assert str(output) == "400 coins."
    roles = [message.role.value for message in memory.get_all()]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]


@streamed_or_not
async def test_an_agent_calls_in_parallel_if_it_may(streaming: bool) -> None:
    with scripted(f"{WEIGH}\n{PRICE}", "Done.") as llm:
        for allowed, expected in ((True, ["weigh", "price"]), (False, ["weigh"])):
            agent = FunctionAgent(tools=[weigh, price], llm=llm, streaming=streaming, allow_parallel_tool_calls=allowed)
            run = agent.run(user_msg=QUESTION)
            assert sorted(r.tool_name for r in of_type(await seen(run), ToolCallResult)) == sorted(expected)
            assert str(await run) == "Done."


@streamed_or_not
async def test_the_first_call_may_be_forced(streaming: bool) -> None:
    with scripted("Never!<to", "Done.") as llm:
        agent = FunctionAgent(tools=[weigh, price], llm=llm, streaming=streaming, initial_tool_choice="price")
        run = agent.run(user_msg=QUESTION)
        assert [r.tool_name for r in of_type(await seen(run), ToolCallResult)] == ["price"]
        assert str(await run) == "Done."


@streamed_or_not
async def test_a_call_without_arguments(streaming: bool) -> None:
    calls: list[str] = []
    tool = FunctionTool.from_defaults(lambda: calls.append("called"), name="nothing", description="Does nothing.")
    with scripted(call("nothing"), "Done.") as llm:
        assert str(await FunctionAgent(tools=[tool], llm=llm, streaming=streaming).run(user_msg="x")) == "Done."
    assert calls == ["called"]


async def test_a_tool_is_found_by_a_name_that_openai_would_not_take() -> None:
    tool = FunctionTool.from_defaults(weigh, name="my.weigh")
    with scripted(call("my.weigh", animal="sheep"), "80 kg.") as llm:
        run = FunctionAgent(tools=[tool], llm=llm).run(user_msg="x")
        assert [str(r.tool_output) for r in of_type(await seen(run), ToolCallResult)] == ["80"]
        await run


@streamed_or_not
async def test_the_failure_of_a_tool_is_told_to_the_model(streaming: bool) -> None:
    def fail(animal: str) -> str:
        """Fails."""
        raise ValueError("no scales")

    with scripted(call("fail", animal="sheep"), "I cannot.") as llm:
        run = FunctionAgent(tools=[fail], llm=llm, streaming=streaming).run(user_msg="x")
        events = await seen(run)
        [result] = of_type(events, ToolCallResult)
        assert result.tool_output.is_error
        assert of_type(events, AgentInput)[-1].input[-1].content == "no scales"
        assert str(await run) == "I cannot."


@streamed_or_not
async def test_a_result_may_be_the_answer(streaming: bool) -> None:
    tool = FunctionTool.from_defaults(weigh, return_direct=True)
    with scripted(WEIGH, "never said") as llm:
        memory = memory_of(llm)
        agent = FunctionAgent(tools=[tool], llm=llm, streaming=streaming)
        assert str(await agent.run(user_msg="x", memory=memory)) == "80"
        # The conversation goes on: with the call, its result, and the result as the assistant's own words.
        assert str(await agent.run(user_msg="y", memory=memory, max_iterations=3)) == "never said"


async def test_a_direct_result_that_failed_is_tried_again() -> None:
    def flaky(again: bool = False) -> str:
        """Fails at first."""
        if not again:
            raise RuntimeError("again")
        return "done"

    tool = FunctionTool.from_defaults(flaky, return_direct=True)
    with scripted(call("flaky", again=False), call("flaky", again=True)) as llm:
        run = FunctionAgent(tools=[tool], llm=llm).run(user_msg="x")
        assert [r.tool_output.is_error for r in of_type(await seen(run), ToolCallResult)] == [True, False]
        assert str(await run) == "done"


async def test_too_many_turns_are_an_error_or_end_in_an_answer() -> None:
    with scripted(WEIGH) as llm:
        with pytest.raises(WorkflowRuntimeError, match="Max iterations of 2"):
            await FunctionAgent(tools=[weigh], llm=llm).run(user_msg="x", max_iterations=2)
    with scripted(WEIGH, WEIGH, "Enough.") as llm:
        agent = FunctionAgent(tools=[weigh], llm=llm, early_stopping_method="generate")
        assert str(await agent.run(user_msg="x", max_iterations=2)) == "Enough."  # a system message comes last


@pytest.mark.filterwarnings("ignore::workflows.context.state_store.UnserializableKeyWarning")  # the memory's
async def test_the_events_of_a_run_can_be_saved() -> None:
    """Workflows write them as JSON, raw responses included, and so the context with its messages."""
    with scripted(thought("Hm.", WEIGH), "80 kg.") as llm:
        agent = FunctionAgent(tools=[weigh], llm=llm)
        context = Context(agent)
        run = agent.run(user_msg="x", ctx=context)
        for event in await seen(run):
            json.dumps(event.model_dump(mode="json"))
        await run
        restored = Context.from_dict(agent, json.loads(json.dumps(context.to_dict())))
        assert str(await agent.run(user_msg="y", ctx=restored)) != ""


async def test_one_event_for_each_answer(recorder: Recorder) -> None:
    with scripted(WEIGH, "80 kg.", callback_manager=CallbackManager([recorder])) as llm:
        await FunctionAgent(tools=[weigh], llm=llm).run(user_msg="x")
    assert [kind for kind, _ in recorder.ends].count(CBEventType.LLM) == 2


async def test_a_person_may_be_asked_between() -> None:
    async def ask(ctx: Context) -> str:
        """Ask the user."""
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="Name?"))
        return f"The name is {answer.response}"

    with scripted(call("ask"), "Hello Ann.") as llm:
        run = FunctionAgent(tools=[ask], llm=llm).run(user_msg="x")
        async for event in run.stream_events():
            if isinstance(event, InputRequiredEvent):
                run.ctx.send_event(HumanResponseEvent(response="Ann"))
            if isinstance(event, ToolCallResult):
                assert str(event.tool_output) == "The name is Ann"
        assert str(await run) == "Hello Ann."


# -- thoughts -----------------------------------------------------------------------------------------------------


def code(agent_llm: LlamaWorkerLLM) -> CodeActAgent:
    return CodeActAgent(code_execute_fn=lambda code: "", llm=agent_llm)


MAKERS: list[Callable[[LlamaWorkerLLM], Any]] = [lambda llm: FunctionAgent(llm=llm), code]


@pytest.mark.parametrize("make", MAKERS, ids=["FunctionAgent", "CodeActAgent"])
async def test_thoughts_are_streamed_beside_the_text(make: Callable[[LlamaWorkerLLM], Any]) -> None:
    with scripted(thought("Hm, well.", "Hello.")) as llm:
        run = make(llm).run(user_msg="x")
        chunks = of_type(await seen(run), AgentStream)
        output = await run
    assert "".join(chunk.thinking_delta or "" for chunk in chunks) == "Hm, well."
    assert "".join(chunk.delta for chunk in chunks) == "Hello."
    assert {chunk.delta for chunk in chunks if chunk.thinking_delta} == {""}
    assert str(output) == "Hello."


async def test_a_react_agent_streams_thoughts_too() -> None:
    with scripted(thought("Hm.", "Thought: I can answer.\nAnswer: Hello.")) as llm:
        run = ReActAgent(llm=llm).run(user_msg="x")
        chunks = of_type(await seen(run), AgentStream)
        assert "".join(chunk.thinking_delta or "" for chunk in chunks) == "Hm."
        assert str(await run) == "Hello."


@streamed_or_not
async def test_a_reply_of_thoughts_alone_keeps_them(streaming: bool) -> None:
    """Where core recovers an answer from the thoughts, it looks for these blocks."""
    with scripted(thought("It is Paris.")) as llm:
        output = await FunctionAgent(llm=llm, streaming=streaming).run(user_msg="x")
    [thinking] = [block for block in output.response.blocks if isinstance(block, ThinkingBlock)]
    assert thinking.content == "It is Paris."
    assert output.tool_calls == []


async def test_calls_are_streamed_while_they_are_written() -> None:
    with scripted(WEIGH, "80 kg.") as llm:
        run = FunctionAgent(tools=[weigh], llm=llm).run(user_msg="x")
        told = [chunk.tool_calls for chunk in of_type(await seen(run), AgentStream)]
        await run
    kwargs = [calls[0].tool_kwargs for calls in told if calls]
    assert kwargs[0] == {}
    assert {"animal": "she"} in kwargs
    assert kwargs[-1] == {"animal": "sheep"}


async def test_the_answer_of_an_agent_is_streamed() -> None:
    with scripted(WEIGH, "It is 80 kg.") as llm:
        run = FunctionAgent(tools=[weigh], llm=llm).run(user_msg="x")
        chunks = of_type(await seen(run), AgentStream)
        await run
    assert "".join(chunk.delta for chunk in chunks) == "It is 80 kg."
    assert chunks[-1].response == "It is 80 kg."
    assert chunks[-1].raw["finish_reason"] == "stop"


async def test_a_call_that_was_cut_off_is_not_made() -> None:
    made: list[str] = []
    tool = FunctionTool.from_defaults(made.append, name="weigh", description="x")
    with scripted(f"Well. {WEIGH}", max_tokens=len(f"Well. {WEIGH}") - 18) as llm:
        output = await FunctionAgent(tools=[tool], llm=llm).run(user_msg="x")
    assert (made, output.tool_calls, output.raw["finish_reason"]) == ([], [], "length")
    assert not any(isinstance(block, ToolCallBlock) for block in output.response.blocks)


# -- structured answers -------------------------------------------------------------------------------------------

SUNG = json.dumps(SONG)


@streamed_or_not
async def test_an_agent_may_answer_by_an_object(streaming: bool) -> None:
    with scripted("Yesterday, of 1965.", SUNG) as llm:
        run = FunctionAgent(llm=llm, output_cls=Song, streaming=streaming).run(user_msg="A song?")
        assert len(of_type(await seen(run), AgentStreamStructuredOutput)) == 1
        output = await run
    assert str(output) == "Yesterday, of 1965."
    assert output.get_pydantic_model(Song) == Song(**SONG)


async def test_a_workflow_may_answer_by_an_object() -> None:
    with scripted("Yesterday, of 1965.", SUNG) as llm:
        agent = FunctionAgent(llm=llm, name="singer", description="Sings.")
        output = await AgentWorkflow(agents=[agent], output_cls=Song).run(user_msg="A song?")
    assert output.get_pydantic_model(Song) == Song(**SONG)


async def test_an_object_may_be_made_by_a_function() -> None:
    def make(messages: list[ChatMessage]) -> dict[str, Any]:
        return {**SONG, "year": 1900 + len(messages)}

    with scripted("Yesterday.") as llm:
        output = await FunctionAgent(llm=llm, structured_output_fn=make).run(user_msg="A song?")
    assert output.structured_response == {**SONG, "year": 1902}


# -- workflows of agents ------------------------------------------------------------------------------------------


def handoff(to: str) -> str:
    return call("handoff", to_agent=to, reason="It weighs.")


@contextmanager
def two_agents(first: list[str], second: list[str], react: bool = False) -> Iterator[AgentWorkflow]:
    with scripted(*first) as one, scripted(*second) as two:
        asked = FunctionAgent(name="asked", description="Is asked.", llm=one)
        kind = ReActAgent if react else FunctionAgent
        weigher = kind(name="weigher", description="Weighs.", tools=[weigh], llm=two, can_handoff_to=["asked"])
        yield AgentWorkflow(agents=[asked, weigher], root_agent="asked")


async def test_agents_hand_over() -> None:
    with two_agents([thought("Not me.", handoff("weigher"))], [WEIGH, "80 kg."]) as workflow:
        run = workflow.run(user_msg="How heavy is a sheep?")
        events = await seen(run)
        assert str(await run) == "80 kg."
    assert {event.current_agent_name for event in of_type(events, AgentOutput)} == {"asked", "weigher"}
    assert [r.tool_name for r in of_type(events, ToolCallResult)] == ["handoff", "weigh"]


async def test_agents_of_both_kinds_hand_over() -> None:
    action = 'Thought: I weigh.\nAction: weigh\nAction Input: {"animal": "sheep"}'
    with two_agents([handoff("weigher")], [action, "Thought: I know.\nAnswer: 80 kg."], react=True) as workflow:
        assert str(await workflow.run(user_msg="How heavy is a sheep?")) == "80 kg."


async def test_an_agent_that_is_not_there_is_told_so() -> None:
    """The grammar knows the tool's arguments, and not the names of the agents."""
    with two_agents([handoff("nobody"), "I cannot."], ["never said"]) as workflow:
        run = workflow.run(user_msg="x")
        events = await seen(run)
        assert "Agent nobody not found" in str([str(r.tool_output) for r in of_type(events, ToolCallResult)])
        assert str(await run) == "I cannot."


async def test_a_workflow_keeps_a_state() -> None:
    async def count(ctx: Context, by: int) -> str:
        """Count."""
        async with ctx.store.edit_state() as store:
            store["state"]["counter"] += by
        return "counted"

    with scripted(call("count", by=2), "Done.") as llm:
        agent = FunctionAgent(name="counter", description="Counts.", tools=[count], llm=llm)
        workflow = AgentWorkflow(agents=[agent], initial_state={"counter": 0}, state_prompt="State: {state}. {msg}")
        run = workflow.run(user_msg="x")
        inputs = of_type(await seen(run), AgentInput)
        assert str(await run) == "Done."
        assert (await run.ctx.store.get("state"))["counter"] == 2
    users = [m.content for event in inputs for m in event.input if m.role.value == "user"]
    assert {text.count("State:") for text in users} == {1}


async def test_a_workflow_of_tools_takes_the_kind_of_agent_that_the_model_can() -> None:
    with scripted(WEIGH, "80 kg.") as llm:
        workflow = AgentWorkflow.from_tools_or_functions([weigh], llm=llm)
        assert [type(agent) for agent in workflow.agents.values()] == [FunctionAgent]
        assert str(await workflow.run(user_msg="x")) == "80 kg."
        llm.is_function_calling_model = False
        text_only = AgentWorkflow.from_tools_or_functions([weigh], llm=llm)
        assert [type(agent) for agent in text_only.agents.values()] == [ReActAgent]


# -- ReAct --------------------------------------------------------------------------------------------------------

ACTION = 'Thought: I need to weigh.\nAction: weigh\nAction Input: {"animal": "sheep"}\n'
INVENTED = 'Observation: {"kg": 3}\nThought: So it is 3 kg.\nAnswer: 3 kg.'


@streamed_or_not
async def test_a_react_agent_is_not_told_what_the_model_invents(streaming: bool) -> None:
    """Left alone the model goes on, plays the tool too, and answers by what it made up."""
    with scripted(f"{ACTION}{INVENTED}", "Thought: I can answer.\nAnswer: 80 kg.") as llm:
        run = ReActAgent(tools=[weigh], llm=llm, streaming=streaming).run(user_msg="How heavy is a sheep?")
        events = await seen(run)
        assert [str(r.tool_output) for r in of_type(events, ToolCallResult)] == ["80"]
        assert "3 kg" not in str([event.response for event in of_type(events, AgentOutput)])
        assert str(await run) == "80 kg."


async def test_a_react_agent_gets_another_try() -> None:
    replies = ["", "Thought: Hm.\nAction: weigh\n{}", ACTION, "Thought: I can answer.\nAnswer: 80 kg."]
    with scripted(*replies) as llm:
        run = ReActAgent(tools=[weigh], llm=llm).run(user_msg="x")
        asked = [event.input[-1].content for event in of_type(await seen(run), AgentInput)]
        assert str(await run) == "80 kg."
    assert "Your previous response was empty" in asked[1]
    assert "Error while parsing the output" in asked[2]


# -- cancellation -------------------------------------------------------------------------------------------------


def endless(stage: Stage, reply: str) -> Iterator[Stage]:
    """The stage with a model whose replies nothing but a cancel ends: tools and ignore_eos do not go together."""
    loader = fake_loader(reply, gate=stage.gate, seen=lambda engine: setattr(stage, "engine", engine))
    with fake_worker(loader=loader, chat_template=TEMPLATE, n_ctx=200_000, n_parallel=1) as worker:
        stage.worker = worker
        yield stage
        stage.gate.open()


@pytest.fixture
def talking(stage: Stage) -> Iterator[Stage]:
    yield from endless(stage, "word " * 20_000)


@pytest.fixture
def calling(stage: Stage) -> Iterator[Stage]:
    """In the middle of a call's arguments."""
    yield from endless(stage, call("weigh", animal="s" * 100_000))


def agent_of(stage: Stage, kind: str) -> Any:
    llm = LlamaWorkerLLM(worker=stage.worker)
    if kind == "ReActAgent":
        return ReActAgent(tools=[weigh], llm=llm)
    agent = FunctionAgent(name="agent", description="x", tools=[weigh], llm=llm)
    return AgentWorkflow(agents=[agent]) if kind == "AgentWorkflow" else agent


every_agent = pytest.mark.parametrize("kind", ["FunctionAgent", "ReActAgent", "AgentWorkflow"])


@every_agent
async def test_cancelling_a_run_cancels(kind: str, talking: Stage) -> None:
    talking.gate.shut()
    run = agent_of(talking, kind).run(user_msg="x")
    await asyncio.to_thread(talking.gate.wait_reached)
    await run.cancel_run()
    with pytest.raises(WorkflowCancelledByUser):
        await run
    assert await talking.becomes_free()


@every_agent
async def test_cancelling_a_run_between_two_chunks_cancels(kind: str, talking: Stage) -> None:
    run = agent_of(talking, kind).run(user_msg="x")
    async for event in run.stream_events():
        if isinstance(event, AgentStream):
            break
    await run.cancel_run()
    with pytest.raises(WorkflowCancelledByUser):
        await run
    assert await talking.becomes_free()


@every_agent
async def test_the_timeout_of_a_workflow_cancels(kind: str, talking: Stage) -> None:
    talking.gate.shut()
    agent = agent_of(talking, kind)
    agent._timeout = 0.2
    with pytest.raises(WorkflowTimeoutError):
        await agent.run(user_msg="x")
    assert await talking.becomes_free()


@every_agent
async def test_a_scope_reaches_into_the_steps_of_a_workflow(kind: str, talking: Stage) -> None:
    """And the run ends in order: with the partial answer, as if the model had stopped."""
    with cancel_scope() as scope:
        run = agent_of(talking, kind).run(user_msg="x", max_iterations=2, early_stopping_method="generate")
    async for event in run.stream_events():
        if isinstance(event, AgentStream) and event.delta:
            scope.cancel()
    output = await run
    assert output.raw["finish_reason"] == "cancelled"
    assert await talking.becomes_free()


@streamed_or_not
async def test_cancelling_a_run_in_the_middle_of_a_call_cancels(streaming: bool, calling: Stage) -> None:
    made: list[str] = []
    tool = FunctionTool.from_defaults(lambda animal: made.append(animal), name="weigh", description="x")
    run = FunctionAgent(tools=[tool], llm=LlamaWorkerLLM(worker=calling.worker), streaming=streaming).run(user_msg="x")
    if streaming:
        async for event in run.stream_events():
            if isinstance(event, AgentStream) and event.tool_calls and event.tool_calls[0].tool_kwargs:
                break
    else:
        calling.gate.shut()
        await asyncio.to_thread(calling.gate.wait_reached)
    await run.cancel_run()
    with pytest.raises(WorkflowCancelledByUser):
        await run
    assert await calling.becomes_free()
    assert made == []
