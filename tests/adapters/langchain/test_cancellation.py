"""Whoever stops listening stops the worker; whoever is stopped is told."""

import asyncio
import gc
import threading
from typing import Any

import pytest
from langchain_core.exceptions import LangChainException
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from llama_worker import (
    ContextOverflowError,
    DeadlineExceeded,
    GenerationCancelled,
    GenerationError,
    QueueFull,
    WorkerClosed,
    WorkerConfig,
    WorkerDied,
    cancel_scope,
)
from llama_worker.testing import Fault, Gate, fake_loader, fake_worker
from tests.adapters.langchain.conftest import ENDLESS, Stage

MODELS = [ChatLlamaWorker, LlamaWorkerLLM]


def endless(stage: Stage, cls: Any = ChatLlamaWorker, **fields: Any) -> Any:
    return cls(worker=stage.worker, **{**ENDLESS, **fields})


@pytest.mark.parametrize("cls", MODELS)
def test_breaking_out_of_a_stream_cancels(stage: Stage, cls: type) -> None:
    for _ in endless(stage, cls).stream("go"):
        break
    assert stage.is_free()


@pytest.mark.parametrize("cls", MODELS)
def test_closing_a_stream_cancels(stage: Stage, cls: type) -> None:
    stream = endless(stage, cls).stream("go")
    next(stream)
    stream.close()
    assert stage.is_free()


@pytest.mark.parametrize("cls", MODELS)
def test_dropping_a_stream_cancels(stage: Stage, cls: type) -> None:
    stream = endless(stage, cls).stream("go")
    next(stream)
    del stream
    gc.collect()
    assert stage.is_free()


def test_an_exception_of_the_consumer_cancels_and_passes(stage: Stage) -> None:
    def consume() -> None:
        for chunk in endless(stage).stream("go"):
            raise KeyError(chunk.id)

    with pytest.raises(KeyError):
        consume()
    assert stage.is_free()


@pytest.mark.parametrize("cls", MODELS)
async def test_breaking_out_of_an_async_stream_cancels(stage: Stage, cls: type) -> None:
    stream = endless(stage, cls).astream("go")
    await anext(stream)
    await stream.aclose()
    assert await asyncio.to_thread(stage.is_free)


@pytest.mark.parametrize("cls", MODELS)
async def test_an_async_stream_that_is_dropped_cancels(stage: Stage, cls: type) -> None:
    async for _ in endless(stage, cls).astream("go"):
        break
    gc.collect()
    await asyncio.sleep(0)
    assert await asyncio.to_thread(stage.is_free)


@pytest.mark.parametrize("cls", MODELS)
async def test_cancelling_a_task_cancels_its_request(stage: Stage, cls: type) -> None:
    stage.gate.shut()
    task = asyncio.ensure_future(endless(stage, cls).ainvoke("go"))
    await asyncio.to_thread(stage.gate.wait_reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(stage.is_free)


async def test_cancelling_a_task_that_streams_cancels_its_request(stage: Stage) -> None:
    heard = asyncio.Event()

    async def listen() -> None:
        async for _ in endless(stage).astream("go"):
            heard.set()

    task = asyncio.ensure_future(listen())
    await heard.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(stage.is_free)


def test_a_scope_stops_a_chain_that_swallows_the_consumers_break(stage: Stage) -> None:
    """LangChain's chains run the model to its end when their consumer leaves; the scope reaches it."""
    chain = ChatPromptTemplate.from_messages([("user", "{x}")]) | endless(stage) | StrOutputParser()
    with cancel_scope() as scope:
        stream = chain.stream({"x": "go"})
        next(stream)
        scope.cancel()
        with pytest.raises(GenerationCancelled) as caught:
            list(stream)
    assert caught.value.partial is not None
    assert caught.value.partial.usage.completion_tokens < 100_000
    assert stage.is_free()


@pytest.mark.parametrize("cls", MODELS)
def test_a_scope_stops_an_invocation_from_another_thread(stage: Stage, cls: type) -> None:
    stage.gate.shut()
    with cancel_scope() as scope:
        thread = threading.Thread(target=lambda: (stage.gate.wait_reached(), scope.cancel()))
        thread.start()
        with pytest.raises(GenerationCancelled):
            endless(stage, cls).invoke("go")
        thread.join()
    assert stage.is_free()


@pytest.mark.parametrize("cls", MODELS)
def test_a_timeout_is_an_error_of_both_families(stage: Stage, cls: type) -> None:
    for ask in (lambda m: m.invoke("go"), lambda m: list(m.stream("go"))):
        with pytest.raises(DeadlineExceeded, match=r"timeout=0\.05") as caught:
            ask(endless(stage, cls, timeout=0.05))
        assert isinstance(caught.value, LangChainException)
    assert stage.is_free()


def test_a_call_may_bring_its_own_timeout(stage: Stage) -> None:
    with pytest.raises(DeadlineExceeded, match=r"timeout=0\.05"):
        endless(stage, timeout=1000).invoke("go", timeout=0.05)
    assert stage.is_free()


def test_a_prompt_that_does_not_fit_is_langchains_overflow(stage: Stage) -> None:
    """SummarizationMiddleware cuts the history on this one."""
    with pytest.raises(ContextOverflowError) as caught:
        endless(stage).invoke("x" * 200_000)
    assert isinstance(caught.value, LangChainException)
    assert caught.value.n_ctx == 200_000


@pytest.mark.parametrize("ask", [lambda m: m.invoke("go"), lambda m: list(m.stream("go"))], ids=["invoke", "stream"])
def test_a_fault_of_the_engine_is_raised_not_swallowed(ask: Any) -> None:
    loader = fake_loader(faults=[Fault("sample", GenerationError("bad logits"), nth=3)])
    with fake_worker(loader=loader) as worker, pytest.raises((GenerationError, WorkerDied)) as caught:
        ask(ChatLlamaWorker(worker=worker, ignore_eos=True))
    assert isinstance(caught.value, LangChainException)


@pytest.mark.parametrize(
    ("cls", "method"),
    [(ChatLlamaWorker, "invoke"), (LlamaWorkerLLM, "invoke"), (LlamaWorkerEmbeddings, "embed_query")],
)
async def test_a_closed_worker_says_so(cls: Any, method: str) -> None:
    worker = fake_worker("reply")
    worker.close()
    model = cls(worker=worker)
    with pytest.raises(WorkerClosed) as caught:
        getattr(model, method)("go")
    assert isinstance(caught.value, LangChainException)
    with pytest.raises(WorkerClosed):
        await getattr(model, f"a{method}")("go")


@pytest.mark.parametrize("cls", MODELS)
async def test_a_queue_that_stays_full_is_reported_after_the_retries(cls: type) -> None:
    gate = Gate()
    settings = WorkerConfig(on_full="reject", queue_size=1)
    with fake_worker(loader=fake_loader(gate=gate), worker_config=settings, n_parallel=1) as worker:
        model: Any = cls(worker=worker, max_retries=1)
        gate.shut()
        with worker.stream("running"):
            gate.wait_reached()
            with worker.stream("queued"):
                for ask in (lambda: asyncio.to_thread(model.invoke, "go"), lambda: model.ainvoke("go")):
                    with pytest.raises(QueueFull, match="1 requests") as caught:
                        await ask()
                    assert isinstance(caught.value, LangChainException)
        gate.open()
