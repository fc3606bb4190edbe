"""Call: one request on its way to the worker, and the four ways to wait for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextvars import copy_context
from typing import Any, TypeAlias, TypeVar

from llama_worker import (
    AsyncEventStream,
    EventStream,
    Failed,
    Finished,
    GenerationCancelled,
    LlamaWorker,
    Message,
    ReasoningDelta,
    Reply,
    StreamEvent,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
    Usage,
)

T = TypeVar("T")
Delta: TypeAlias = TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta | ToolCallEnded
_NOTHING = Finished(reason="cancelled", text="", usage=Usage())


class Call:
    """`prompt` (text, or messages of a chat) for the worker that `connect` opens. Asked once.

    A stream is submitted by its first step, so one that nobody reads costs nothing. It still belongs to
    the cancel scopes under which the Call was made. One that is cancelled from outside ends in order,
    with finish_reason "cancelled": an exception would make LlamaIndex drop the partial answer.
    """

    def __init__(
        self,
        connect: Callable[[], LlamaWorker],
        model: str,
        prompt: str | Sequence[Message],
        options: Mapping[str, Any],
    ) -> None:
        self._connect = connect
        self._model = model
        self._prompt = prompt
        self._options = options
        self._context = copy_context()
        self._stream: EventStream | AsyncEventStream | None = None

    def generate(self) -> Reply:
        """Raises as LlamaWorker.generate, GenerationCancelled included."""
        return self._connect().generate(self._prompt, **self._options)

    async def agenerate(self) -> Reply:
        return await self._connect().agenerate(self._prompt, **self._options)

    def events(self) -> Generator[Delta | Reply, None, None]:
        """The deltas, then the whole reply. Raises what the request failed with."""
        worker = self._connect()
        try:
            self._stream = stream = self._context.run(lambda: worker.stream(self._prompt, **self._options))
        except GenerationCancelled:  # while it waited for room in the queue
            yield self._reply(_NOTHING)
            return
        for event in stream:
            yield self._read(event)

    async def aevents(self) -> AsyncGenerator[Delta | Reply, None]:
        worker = self._connect()
        self._stream = stream = self._context.run(lambda: worker.astream(self._prompt, **self._options))
        try:
            async for event in stream:
                yield self._read(event)
        except GenerationCancelled:
            yield self._reply(_NOTHING)

    def close(self) -> None:
        """Cancel the request if it was submitted. Idempotent, never blocks, any thread."""
        if self._stream is not None:
            self._stream.close()

    def _read(self, event: StreamEvent) -> Delta | Reply:
        if isinstance(event, Failed):
            raise event.error
        return self._reply(event) if isinstance(event, Finished) else event

    def _reply(self, end: Finished) -> Reply:
        return Reply(
            text=end.text,
            finish_reason=end.reason,
            usage=end.usage,
            model=end.model or self._model,
            logprobs=end.logprobs,
            reasoning=end.reasoning,
            tool_calls=end.tool_calls,
            invalid_tool_calls=end.invalid_tool_calls,
        )


def owned(chunks: Generator[T, None, None], call: Call) -> Generator[T, None, None]:
    """`chunks`, and however their reading ends, the end of `call`.

    The callback decorators of LlamaIndex never close the generator that they wrap, and a handler that
    keeps payloads keeps it alive with the exception it stored. So the owner has to stand outside them.
    """
    try:
        yield from chunks
    finally:
        call.close()


async def aowned(chunks: AsyncGenerator[T, None], call: Call) -> AsyncGenerator[T, None]:
    """The async twin of `owned`."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        call.close()
        await chunks.aclose()
