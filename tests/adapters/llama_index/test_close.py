"""Whoever stops reading stops the generation, whatever the callback handlers keep."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.llama_worker import LlamaWorkerLLM
from pydantic import BaseModel

from llama_worker import cancel_scope
from llama_worker.testing import FakeEngine, Gate, fake_loader, fake_worker

from .conftest import HELLO, Stage
from .scripts import TEMPLATE, call

HANDLERS: list[Callable[[], list[Any]]] = [list, lambda: [LlamaDebugHandler(print_trace_on_end=False)]]


# A reply that only a cancel can end in a test's lifetime: free text, a call, an object.
ENDLESS = {
    "chat": "word " * 20_000,
    "complete": "word " * 20_000,
    "tools": call("weigh", animal="s" * 100_000),
    "program": call("Animal", name="s" * 100_000),
    "predict": f'{{"name": "{"s" * 100_000}"}}',
}


class Animal(BaseModel):
    name: str


def weigh(animal: str) -> str:
    """How heavy an animal is."""
    return animal


TOOLS: dict[str, Any] = {"tools": [FunctionTool.from_defaults(weigh)], "tool_required": True}
PROMPT = PromptTemplate("An animal, please.")


@pytest.fixture(params=ENDLESS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stage(kind: str) -> Iterator[Stage]:
    gate, engines = Gate(), list[FakeEngine]()
    loader = fake_loader(ENDLESS[kind], gate=gate, seen=engines.append)
    with fake_worker(loader=loader, chat_template=TEMPLATE, n_ctx=200_000, n_parallel=1) as worker:
        yield Stage(worker, engines[0], gate)
        gate.open()


@pytest.fixture(params=HANDLERS, ids=["no handler", "LlamaDebugHandler"])
def llm(request: pytest.FixtureRequest, kind: str, stage: Stage) -> LlamaWorkerLLM:
    """With and without a handler that keeps payloads, and so the exceptions and their frames."""
    mode = PydanticProgramMode.FUNCTION if kind == "program" else PydanticProgramMode.DEFAULT
    manager = CallbackManager(request.param())
    return LlamaWorkerLLM(worker=stage.worker, callback_manager=manager, pydantic_program_mode=mode)


def opened(llm: LlamaWorkerLLM, kind: str) -> Any:
    if kind == "chat":
        return llm.stream_chat(HELLO)
    if kind == "tools":
        return llm.stream_chat_with_tools(user_msg="Hello", **TOOLS)
    if kind == "complete":
        return llm.stream_complete("Hello")
    return llm.stream_structured_predict(Animal, PROMPT)


async def aopened(llm: LlamaWorkerLLM, kind: str) -> Any:
    if kind == "chat":
        return await llm.astream_chat(HELLO)
    if kind == "tools":
        return await llm.astream_chat_with_tools(user_msg="Hello", **TOOLS)
    if kind == "complete":
        return await llm.astream_complete("Hello")
    return await llm.astream_structured_predict(Animal, PROMPT)


def test_close_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    stream = opened(llm, kind)
    next(stream)
    stream.close()
    assert stage.is_free()
    assert list(stream) == []


def test_break_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    def read_one() -> None:
        for _ in opened(llm, kind):
            break

    read_one()
    assert stage.is_free()


def test_an_exception_of_the_consumer_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    def read_and_fail() -> None:
        for _ in opened(llm, kind):
            raise KeyError

    with pytest.raises(KeyError):
        read_and_fail()
    assert stage.is_free()


def test_a_stream_that_nobody_reads_submits_nothing(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    stream = opened(llm, kind)
    assert stage.worker.status().steps == 0
    stream.close()
    assert stage.engine.n_rows == 0
    assert stage.is_free()


async def test_an_async_stream_that_nobody_reads_submits_nothing(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    stream = await aopened(llm, kind)
    await asyncio.sleep(0)
    assert stage.engine.n_rows == 0
    await stream.aclose()
    assert await stage.becomes_free()


async def test_aclose_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    stream = await aopened(llm, kind)
    await anext(stream)
    await stream.aclose()
    assert await stage.becomes_free()


async def test_aclose_cancels_before_the_loop_turns_again(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    """What is left to the finaliser of async generators runs later, or never if the loop ends."""
    stream = await aopened(llm, kind)
    await anext(stream)
    await stream.aclose()
    assert kind == "program" or stage.is_free()  # LlamaIndex's own program leaves it to the finaliser


async def test_break_out_of_an_async_stream_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    async def read_one() -> None:
        async for _ in await aopened(llm, kind):
            break

    await read_one()
    assert await stage.becomes_free()


async def test_an_exception_of_the_async_consumer_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    async def read_and_fail() -> None:
        async for _ in await aopened(llm, kind):
            raise KeyError

    with pytest.raises(KeyError):
        await read_and_fail()
    assert await stage.becomes_free()


async def test_cancelling_a_task_that_waits_for_a_chunk_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    stage.gate.shut()
    stream = await aopened(llm, kind)
    task = asyncio.ensure_future(anext(stream))
    await asyncio.to_thread(stage.gate.wait_reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stage.becomes_free()


async def test_cancelling_a_task_that_is_elsewhere_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    reading, never = asyncio.Event(), asyncio.Event()

    async def read_slowly() -> None:
        async for _ in await aopened(llm, kind):
            reading.set()
            await never.wait()

    task = asyncio.create_task(read_slowly())
    await reading.wait()
    task.cancel()
    await asyncio.wait([task])
    del task
    assert await stage.becomes_free()


async def aasked(llm: LlamaWorkerLLM, kind: str) -> Any:
    if kind == "chat":
        return await llm.achat(HELLO)
    if kind == "tools":
        return await llm.achat_with_tools(user_msg="Hello", **TOOLS)
    if kind == "complete":
        return await llm.acomplete("Hello")
    return await llm.astructured_predict(Animal, PROMPT)


async def test_cancelling_a_call_cancels(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    stage.gate.shut()
    task = asyncio.ensure_future(aasked(llm, kind))
    await asyncio.to_thread(stage.gate.wait_reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stage.becomes_free()


def assert_ended_in_order(kind: str, rest: list[Any]) -> None:
    """What ends a stream of chunks says so; a stream of objects just ends."""
    if kind in ("predict", "program"):
        return
    assert rest[-1].raw["finish_reason"] == "cancelled"
    assert rest[-1].raw["usage"]["completion_tokens"] > 0
    if kind == "tools":  # the call that was being written is none
        assert rest[-1].message.additional_kwargs == {}
        assert len(rest[-1].raw["invalid_tool_calls"]) == 1


def test_a_scope_reaches_a_stream_that_is_read_outside_of_it(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    """The request is submitted by the first step, but belongs to where it was asked for."""
    if kind == "program":
        pytest.skip("LlamaIndex's own program asks by its first step")
    with cancel_scope() as scope:
        stream = opened(llm, kind)
    next(stream)
    scope.cancel()
    assert_ended_in_order(kind, list(stream))
    assert stage.is_free()


async def test_a_scope_reaches_an_async_stream_that_is_read_outside_of_it(
    llm: LlamaWorkerLLM, kind: str, stage: Stage
) -> None:
    with cancel_scope() as scope:
        stream = await aopened(llm, kind)
    await anext(stream)
    scope.cancel()
    assert_ended_in_order(kind, [chunk async for chunk in stream])
    assert await stage.becomes_free()


def test_a_loop_that_closes_over_an_open_stream_frees_the_worker(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    async def leave_open() -> Any:
        stream = await aopened(llm, kind)
        await anext(stream)
        return stream

    abandoned = asyncio.run(leave_open())
    assert stage.is_free()
    del abandoned
