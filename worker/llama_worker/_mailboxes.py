"""Mailboxes: the sinks that the worker fills and that readers empty. They never block who fills them."""

from __future__ import annotations

import asyncio
import queue
from collections import deque

from llama_worker import _postman
from llama_worker._cancel import CancelFlag
from llama_worker._events import Failed, Finished, StreamEvent
from llama_worker._loop_door import LoopDoor


class Mailbox:
    """The sink of a sync stream: filled by the worker, emptied by the reader's thread."""

    __slots__ = ("_queue", "_taken")

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[StreamEvent] = queue.SimpleQueue()
        self._taken = 0
        _postman.start()

    def put(self, event: StreamEvent) -> None:
        _postman.post(self._queue.put, event)

    def get(self, timeout: float) -> StreamEvent | None:
        try:
            event = self._queue.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None
        self._taken += 1
        return event

    def taken_while_waiting(self) -> int | None:
        return None if self._queue.empty() else self._taken


class LastWord(Mailbox):
    """The sink of a caller who wants the whole reply: it is not woken before the end, which has the whole text."""

    __slots__ = ()

    def put(self, event: StreamEvent) -> None:
        if isinstance(event, Finished | Failed):
            self._queue.put(event)


class AsyncMailbox:
    """The sink of an async stream: filled by any thread, emptied on one event loop.

    `whole`: the reader wants the last event only, and is not woken before.
    """

    __slots__ = ("__weakref__", "_cancel", "_door", "_events", "_reader", "_taken", "_whole")

    def __init__(self, door: LoopDoor, cancel: CancelFlag, *, whole: bool = False) -> None:
        self._door = door
        self._cancel = cancel
        self._whole = whole
        self._events: deque[StreamEvent] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._taken = 0

    def put(self, event: StreamEvent) -> None:
        if self._whole and not isinstance(event, Finished | Failed):
            return
        self._events.append(event)
        if self._reader is not None and not self._door.knock(self._wake):
            self._cancel.cancel()  # nobody can ever read it

    async def get(self) -> StreamEvent:
        while not self._events:
            # The reader shows itself before it looks again, as put() stores before it looks for a reader.
            self._reader = asyncio.get_running_loop().create_future()
            if not self._events:
                await self._reader
            self._reader = None
        self._taken += 1
        return self._events.popleft()

    def taken_while_waiting(self) -> int | None:
        return self._taken if self._events else None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
