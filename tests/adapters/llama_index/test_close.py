"""Whoever stops reading stops the generation, whatever the callback handlers keep."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import cancel_scope

from .conftest import HELLO, Stage

HANDLERS: list[Callable[[], list[Any]]] = [list, lambda: [LlamaDebugHandler(print_trace_on_end=False)]]


@pytest.fixture(params=HANDLERS, ids=["no handler", "LlamaDebugHandler"])
def llm(request: pytest.FixtureRequest, stage: Stage) -> LlamaWorkerLLM:
    """Endless, with and without a handler that keeps payloads, and so the exceptions and their frames."""
    return stage.endless(callback_manager=CallbackManager(request.param()))


@pytest.fixture(params=["chat", "complete"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(llm: LlamaWorkerLLM, kind: str) -> Any:
    return llm.stream_chat(HELLO) if kind == "chat" else llm.stream_complete("Hello")


async def aopened(llm: LlamaWorkerLLM, kind: str) -> Any:
    return await (llm.astream_chat(HELLO) if kind == "chat" else llm.astream_complete("Hello"))


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


@pytest.mark.parametrize("name", ["achat", "acomplete"])
async def test_cancelling_a_call_cancels(name: str, llm: LlamaWorkerLLM, stage: Stage) -> None:
    stage.gate.shut()
    call = llm.achat(HELLO) if name == "achat" else llm.acomplete("Hello")
    task = asyncio.ensure_future(call)
    await asyncio.to_thread(stage.gate.wait_reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stage.becomes_free()


def test_a_scope_reaches_a_stream_that_is_read_outside_of_it(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    """The request is submitted by the first step, but belongs to where it was asked for."""
    with cancel_scope() as scope:
        stream = opened(llm, kind)
    next(stream)
    scope.cancel()
    last = list(stream)[-1]
    assert last.raw["finish_reason"] == "cancelled"
    assert last.raw["usage"]["completion_tokens"] > 0
    assert stage.is_free()


async def test_a_scope_reaches_an_async_stream_that_is_read_outside_of_it(
    llm: LlamaWorkerLLM, kind: str, stage: Stage
) -> None:
    with cancel_scope() as scope:
        stream = await aopened(llm, kind)
    await anext(stream)
    scope.cancel()
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].raw["finish_reason"] == "cancelled"
    assert await stage.becomes_free()


def test_a_loop_that_closes_over_an_open_stream_frees_the_worker(llm: LlamaWorkerLLM, kind: str, stage: Stage) -> None:
    async def leave_open() -> Any:
        stream = await aopened(llm, kind)
        await anext(stream)
        return stream

    abandoned = asyncio.run(leave_open())
    assert stage.is_free()
    del abandoned
