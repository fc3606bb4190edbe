"""What type checkers see of the worker. Checked by mypy, never run."""

from collections.abc import Iterator
from typing import assert_type

from llama_worker import (
    AsyncEventStream,
    CancelScope,
    EventStream,
    Failed,
    Finished,
    FinishReason,
    LlamaWorker,
    Message,
    ModelConfig,
    ModelInfo,
    Reply,
    StreamEvent,
    TextDelta,
    Usage,
    WorkerHandle,
    can_think,
    cancel_scope,
    get_handle,
    get_worker,
    inspect_model,
)


def sync_calls(worker: LlamaWorker) -> None:
    reply = worker.generate([Message(role="user", content="hello")], max_tokens=8, temperature=0.0)
    assert_type(reply, Reply)
    assert_type(reply.usage, Usage)
    assert_type(reply.finish_reason, FinishReason)
    assert_type(worker.generate([{"role": "user", "content": "hello"}]), Reply)
    assert_type(worker.embed(["one", "two"]), list[list[float]])
    assert_type(worker.tokenize("text"), list[int])
    assert_type(worker.detokenize([1, 2]), str)
    assert_type(worker.count_tokens("text"), int)
    assert_type(worker.info, ModelInfo)
    assert_type(worker.config, ModelConfig)
    assert_type(worker.n_ctx, int)


def streams(worker: LlamaWorker) -> None:
    stream = worker.stream("Once upon a time")
    assert_type(stream, EventStream)
    assert_type(stream.text(), Iterator[str])
    for event in stream:
        assert_type(event, StreamEvent)
        match event:
            case TextDelta():
                assert_type(event.text, str)
            case Finished():
                assert_type(event.reason, FinishReason)
            case Failed():
                assert_type(event.error, Exception)


async def async_calls(worker: LlamaWorker) -> None:
    assert_type(await worker.agenerate("Once"), Reply)
    assert_type(await worker.aembed(["one"]), list[list[float]])
    assert_type(worker.astream("Once"), AsyncEventStream)
    async for event in worker.astream("Once"):
        assert_type(event, StreamEvent)


def openers() -> None:
    with LlamaWorker("demo://smollm2-135m-instruct") as worker:
        assert_type(worker, LlamaWorker)
    assert_type(get_worker(ModelConfig(model="demo://smollm2-135m-instruct")), LlamaWorker)
    assert_type(get_handle("demo://smollm2-135m-instruct"), WorkerHandle)
    assert_type(get_handle("demo://smollm2-135m-instruct").worker(), LlamaWorker)
    assert_type(inspect_model("demo://smollm2-135m-instruct"), ModelInfo)
    assert_type(can_think(inspect_model("demo://smollm2-135m-instruct")), bool)
    with cancel_scope(deadline=1.0) as scope:
        assert_type(scope, CancelScope)
        assert_type(scope.cancelled, bool)
