"""Batch: many prompts in one call, answered in order, each with its reply or its error.

One request after another is submitted on the caller's own thread or task, while those that are finished are
collected. So a batch never has more than one place in the line before a full channel, whatever its length.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

from llama_worker._cancel import CancelFlag, seconds_left
from llama_worker._commands import EventSink
from llama_worker._errors import InvalidRequestError, QueueFull, RequestError
from llama_worker._events import Failed, Finished, Reply, StreamEvent
from llama_worker._loop_door import loop_door
from llama_worker._prompts import Prompt
from llama_worker._requests import GenerationRequest
from llama_worker._streams import LONGEST_WAIT, fold

Ask: TypeAlias = Callable[[Prompt], GenerationRequest]
NewFlag: TypeAlias = Callable[[float | None], tuple[CancelFlag, float | None]]


class Submit(Protocol):
    """Gets a request accepted. Raises what preparing it and the channel raise."""

    def __call__(
        self, request: GenerationRequest, sink: EventSink, cancel: CancelFlag, deadline: float | None
    ) -> None: ...


class AsyncSubmit(Protocol):
    """The async twin of Submit."""

    def __call__(
        self, request: GenerationRequest, sink: EventSink, cancel: CancelFlag, deadline: float | None
    ) -> Coroutine[Any, Any, None]: ...


class Item:
    """One prompt of a batch, and the sink of its request: it keeps the last word and reports `done`."""

    __slots__ = ("cancel", "deadline", "done", "outcome", "request")

    def __init__(self, request: GenerationRequest, cancel: CancelFlag, deadline: float | None) -> None:
        self.request = request
        self.cancel = cancel
        self.deadline = deadline
        self.done: Callable[[Item], object]
        self.outcome: Reply | Exception | None = None

    def put(self, event: StreamEvent) -> None:
        if not isinstance(event, Finished | Failed):
            return
        try:
            self.outcome = fold(event)
        except Exception as exc:  # noqa: BLE001  it belongs to this prompt
            self.outcome = exc
        self.done(self)

    def taken_while_waiting(self) -> int | None:
        return None  # nobody reads along


class Batch:
    """The prompts of one call. Run it once, with `run` or `arun`."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        ask: Ask,
        new_flag: NewFlag,
        max_concurrency: int | None,
        would_refuse: Callable[[], bool],
    ) -> None:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InvalidRequestError("prompts", type(prompts).__name__, "give a list of prompts")
        if max_concurrency is not None and (not isinstance(max_concurrency, int) or max_concurrency < 1):
            raise InvalidRequestError("max_concurrency", max_concurrency, "it is at least 1, or None for no limit")
        self._most = max_concurrency or len(prompts)
        self._entries = [_entry(prompt, ask, new_flag) for prompt in prompts]
        self._running: set[Item] = set()
        self._would_refuse = would_refuse

    def run(self, submit: Submit) -> list[Reply | Exception]:
        """Blocks until every prompt is answered. What interrupts the caller cancels them all."""
        done: queue.SimpleQueue[Item] = queue.SimpleQueue()
        try:
            for item in self._items():
                item.done = done.put
                while self._should_wait():
                    self._collect(done)
                while self._begin(item, self._attempt(submit, item)):
                    self._collect(done)
            while self._running:
                self._collect(done)
        except BaseException:
            self._cancel()
            raise
        return self._outcomes()

    async def arun(self, submit: AsyncSubmit) -> list[Reply | Exception]:
        """The async twin of `run`. Never blocks the event loop."""
        done: asyncio.Queue[Item] = asyncio.Queue()
        door, timers = loop_door(asyncio.get_running_loop()), self._set_timers()
        try:
            for item in self._items():
                item.done = lambda item: door.knock(lambda: done.put_nowait(item))
                while self._should_wait():
                    self._running.discard(await done.get())
                while self._begin(item, await self._aattempt(submit, item)):
                    self._running.discard(await done.get())
            while self._running:
                self._running.discard(await done.get())
        except BaseException:
            self._cancel()
            raise
        finally:
            for timer in timers:
                timer.cancel()
        return self._outcomes()

    # -- inside -------------------------------------------------------------------------------------

    def _items(self) -> Iterable[Item]:
        return (entry for entry in self._entries if isinstance(entry, Item))

    def _should_wait(self) -> bool:
        """Whether one of ours should be finished before the next is submitted: a refusal would be counted."""
        return len(self._running) >= self._most or (bool(self._running) and self._would_refuse())

    def _attempt(self, submit: Submit, item: Item) -> Exception | None:
        self._running.add(item)  # before: it may be answered before submit returns
        try:
            submit(item.request, item, item.cancel, item.deadline)
        except Exception as exc:  # noqa: BLE001  it belongs to this prompt
            return exc
        return None

    async def _aattempt(self, submit: AsyncSubmit, item: Item) -> Exception | None:
        self._running.add(item)
        try:
            await submit(item.request, item, item.cancel, item.deadline)
        except Exception as exc:  # noqa: BLE001  it belongs to this prompt
            return exc
        return None

    def _begin(self, item: Item, error: Exception | None) -> bool:
        """Note how the attempt ended. True when to try again once another of ours is finished."""
        if error is None:
            return False
        self._running.discard(item)
        if isinstance(error, QueueFull) and self._running:
            return True
        item.outcome = error
        return False

    def _collect(self, done: queue.SimpleQueue[Item]) -> None:
        """Wait for one that is finished; meanwhile this thread is the timer of them all."""
        while True:
            try:
                self._running.discard(done.get(timeout=self._patience()))
            except queue.Empty:
                self._expire()
            else:
                return

    def _patience(self) -> float:
        ends = [item.deadline for item in self._running if not item.cancel.expired]
        return min([LONGEST_WAIT, *(left for end in ends if (left := seconds_left(end)) is not None)])

    def _expire(self) -> None:
        now = time.monotonic()
        for item in self._running:
            if item.deadline is not None and now >= item.deadline:
                item.cancel.expire()

    def _set_timers(self) -> list[asyncio.TimerHandle]:
        later = asyncio.get_running_loop().call_later
        ends = {item.deadline for item in self._items()}
        # The loop's own clock may be a little behind: look again rather than miss the deadline.
        return [later(left + 0.001, self._expire) for end in ends if (left := seconds_left(end)) is not None]

    def _cancel(self) -> None:
        for item in self._items():
            item.cancel.cancel()

    def _outcomes(self) -> list[Reply | Exception]:
        return [_outcome(entry) for entry in self._entries]


def _outcome(entry: Item | Exception) -> Reply | Exception:
    outcome = entry.outcome if isinstance(entry, Item) else entry
    assert outcome is not None, "a prompt of the batch has no answer"
    return outcome


def _entry(prompt: Prompt, ask: Ask, new_flag: NewFlag) -> Item | Exception:
    try:
        request = ask(prompt)
    except RequestError as exc:
        return exc
    cancel, deadline = new_flag(request.timeout)
    return Item(request, cancel, deadline)
