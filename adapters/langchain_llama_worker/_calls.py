"""Call: one request on its way to the worker, and the four ways to wait for it.

Here, at the caller's boundary, are the retries and the mapping of errors. Whatever ends the wait early
(a break, a cancelled task, an exception of the consumer) closes the stream, and that cancels the request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from langchain_llama_worker._errors import mapped_errors
from langchain_llama_worker._retry import RetryPolicy
from llama_worker import (
    AsyncEventStream,
    EventStream,
    Failed,
    Finished,
    GenerationCancelled,
    InvalidOutputError,
    LlamaWorker,
    Message,
    ReasoningDelta,
    Reply,
    StreamEvent,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)

Answer: TypeAlias = TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta | ToolCallEnded | Finished
"""An event of a stream that has not failed and was not cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`prompt` (text, or messages of a chat) for the worker that `connect` gives. `model` is its name."""

    connect: Callable[[], LlamaWorker]
    model: str
    prompt: str | Sequence[Message]
    options: Mapping[str, Any]
    stream_usage: bool
    retry: RetryPolicy

    def open(self) -> EventStream:
        """Submit the request. Blocks while the queue is full; raises what the worker says of it."""
        with mapped_errors():
            return self.retry.run(lambda: self.connect().stream(self.prompt, **self.options))


@contextmanager
def _errors(call: Call) -> Iterator[None]:
    """Map errors; a reply that one has is said to be of the model that `call` names, as one that is returned."""
    with mapped_errors():
        try:
            yield
        except InvalidOutputError as error:
            if error.reply is not None:
                error.reply = replace(error.reply, model=call.model)
            raise


def generate(call: Call) -> Reply:
    with _errors(call):
        return call.retry.run(lambda: call.connect().generate(call.prompt, **call.options))


async def agenerate(call: Call) -> Reply:
    with _errors(call):
        return await call.retry.arun(lambda: call.connect().agenerate(call.prompt, **call.options))


def events(call: Call) -> Generator[Answer, None, None]:
    with _errors(call), call.open() as stream:
        for event in stream:
            yield _answer(event, call)


async def aevents(call: Call) -> AsyncGenerator[Answer, None]:
    with _errors(call):
        stream, first = await call.retry.arun(lambda: _first_event(call))
        with closing(stream):
            yield _answer(first, call)
            async for event in stream:
                yield _answer(event, call)


async def _first_event(call: Call) -> tuple[AsyncEventStream, StreamEvent]:
    """An async stream is submitted by its first step, so that is what an attempt has to include."""
    stream = call.connect().astream(call.prompt, **call.options)
    return stream, await anext(stream)


def _answer(event: StreamEvent, call: Call) -> Answer:
    """`event`, unless the stream ended otherwise than in order; then raise as `generate` does."""
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Finished) and event.reason == "cancelled":
        raise GenerationCancelled(_reply(event, call.model))
    return event


def _reply(end: Finished, model: str) -> Reply:
    return Reply(
        text=end.text,
        finish_reason=end.reason,
        usage=end.usage,
        model=model,
        logprobs=end.logprobs,
        reasoning=end.reasoning,
        tool_calls=end.tool_calls,
        invalid_tool_calls=end.invalid_tool_calls,
    )
