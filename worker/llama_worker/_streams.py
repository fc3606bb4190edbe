"""EventStream and AsyncEventStream: what the caller iterates while the worker fills it.

The worker writes into a mailbox that never blocks it: how much may come is bounded by max_tokens, so a
slow or vanished reader slows nobody. The worker never holds the stream itself, so a stream that is
dropped is collected at once, and its end cancels the request.

The reader is also the request's timer: it is the one that waits, so when the deadline passes while it
waits it sets the flag that aborts even a running decode. A reader that does not wait needs no such
precision; for it the worker looks at the clock between two steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any

from llama_worker._cancel import CancelFlag, seconds_left
from llama_worker._errors import GenerationCancelled
from llama_worker._events import Failed, Finished, Reply, StreamEvent, TextDelta, reply_of
from llama_worker._loop_door import loop_door
from llama_worker._mailboxes import AsyncMailbox, Mailbox

LONGEST_WAIT = 1.0  # seconds; a wait is cut into such pieces so that Ctrl-C is seen on every platform


class EventStream:
    """The events of one request, as they come: deltas, then one Finished or Failed, which is yielded.

    Iterate it from one thread. `close` may be called from any thread, never blocks and cancels the
    request; so do leaving the `with` block, dropping the stream, and its garbage collection. A stream
    that is cancelled while somebody reads it ends with Finished("cancelled").
    """

    def __init__(self, mailbox: Mailbox, cancel: CancelFlag, deadline: float | None, owner: object = None) -> None:
        self._owner = owner  # a worker that nobody else holds lives as long as its streams
        self._mailbox = mailbox
        self._cancel = cancel
        self._deadline = deadline
        self._ended = False

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        if self._ended:
            raise StopIteration
        event = self._next_event()
        self._ended = isinstance(event, Finished | Failed)
        return event

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._cancel.cancel()

    def close(self) -> None:
        """Cancel the request. Idempotent; does nothing after the end."""
        self._cancel.cancel()

    def reply(self) -> Reply:
        """Read the rest and fold the whole stream. Blocks.

        Raises GenerationCancelled when it was cancelled, or the error that it failed with.
        """
        return fold(_last(self))

    def text(self) -> Iterator[str]:
        """The text alone, piece by piece. Raises like `reply` at the end."""
        for event in self:
            if isinstance(event, TextDelta):
                yield event.text
            elif isinstance(event, Finished | Failed):
                fold(event)

    def _next_event(self) -> StreamEvent:
        while True:
            event = self._mailbox.get(_patience(self._deadline))
            if event is not None:
                return event
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._cancel.expire()


def _patience(deadline: float | None) -> float:
    if deadline is None:
        return LONGEST_WAIT
    # After the deadline the worker's answer is on its way: wait for it as for any other event.
    left = deadline - time.monotonic()
    return min(left, LONGEST_WAIT) if left > 0 else LONGEST_WAIT / 20


Start = Callable[[AsyncMailbox], Coroutine[Any, Any, None]]
"""Prepares the request and gets it into the channel; raises the typed errors of both."""


class AsyncEventStream:
    """The async twin of EventStream. Iterate it on one event loop; the first step submits the request.

    A task that is cancelled while it waits here cancels the request. `close` may be called from any
    thread; `aclose` does the same and does not wait for the worker.
    """

    def __init__(self, start: Start, cancel: CancelFlag, deadline: float | None, owner: object = None) -> None:
        self._owner = owner  # as in EventStream
        self._start = start
        self._cancel = cancel
        self._deadline = deadline
        self._mailbox: AsyncMailbox | None = None
        self._whole = False
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._ended:
            raise StopAsyncIteration
        try:
            mailbox = self._mailbox or await self._submit()
            event = await mailbox.get()
        except BaseException:
            self._finish()
            self._cancel.cancel()
            raise
        if isinstance(event, Finished | Failed):
            self._finish()
        return event

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._cancel.cancel()

    def close(self) -> None:
        """Cancel the request. Idempotent, non-blocking, any thread; does nothing after the end."""
        self._cancel.cancel()

    async def aclose(self) -> None:
        """As `close`: returns at once."""
        self.close()

    async def reply(self) -> Reply:
        """Read the rest and fold the whole stream. Raises as EventStream.reply."""
        self._whole = self._mailbox is None
        last: StreamEvent | None = None
        async for event in self:
            last = event
        return fold(last)

    async def text(self) -> AsyncIterator[str]:
        """The text alone, piece by piece. Raises like `reply` at the end."""
        async for event in self:
            if isinstance(event, TextDelta):
                yield event.text
            elif isinstance(event, Finished | Failed):
                fold(event)

    async def _submit(self) -> AsyncMailbox:
        loop = asyncio.get_running_loop()
        if (left := seconds_left(self._deadline)) is not None:
            self._timer = loop.call_later(left, self._cancel.expire)
        mailbox = AsyncMailbox(loop_door(loop), self._cancel, whole=self._whole)
        await self._start(mailbox)
        self._mailbox = mailbox
        return mailbox

    def _finish(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()


def _last(stream: Iterator[StreamEvent]) -> StreamEvent | None:
    last: StreamEvent | None = None
    for last in stream:  # noqa: B007  the loop is the point
        pass
    return last


def fold(last: StreamEvent | None) -> Reply:
    """The reply that ends with `last`. Raises GenerationCancelled, or the error of a Failed."""
    if isinstance(last, Failed):
        raise last.error
    if not isinstance(last, Finished):
        raise ValueError("the stream was read to its end before")
    reply = reply_of(last)
    if last.reason == "cancelled":
        raise GenerationCancelled(reply)
    return reply
