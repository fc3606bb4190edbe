"""What is done elsewhere, waited for until it is there, the deadline passes or its flag is set."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from llama_worker._cancel import CancelFlag, seconds_left
from llama_worker._commands import settle
from llama_worker._errors import DeadlineExceeded, GenerationCancelled

T = TypeVar("T")


def awaited(work: Future[T], cancel: CancelFlag, deadline: float | None, timeout: float | None) -> T:
    """What comes of `work`. Blocks. Raises what it raises; GenerationCancelled, DeadlineExceeded."""
    answer = _unless(work, cancel)
    try:
        return answer.result(seconds_left(deadline))
    except TimeoutError:
        if answer.done():  # it is what `work` raised
            raise
        raise DeadlineExceeded(timeout) from None


async def aawaited(work: Future[T], cancel: CancelFlag, deadline: float | None, timeout: float | None) -> T:
    """The async twin of `awaited`."""
    answer = _unless(work, cancel)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(answer), seconds_left(deadline))
    except TimeoutError:
        if answer.done() and not answer.cancelled():
            raise
        raise DeadlineExceeded(timeout) from None


async def carried_through(work: Future[T]) -> T:
    """What comes of `work`, which goes on when the waiting task is cancelled; how it ended then interests nobody."""
    done = asyncio.wrap_future(work)
    done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return await asyncio.shield(done)


def _unless(work: Future[T], cancel: CancelFlag) -> Future[T]:
    """What `work` gives, or GenerationCancelled as soon as `cancel` is set."""
    answer: Future[T] = Future()

    def pass_on(done: Future[T]) -> None:
        error = done.exception()
        if isinstance(error, Exception):
            settle(answer, error=error)
        else:
            settle(answer, result=done.result())

    work.add_done_callback(pass_on)
    cancel.arm(lambda: settle(answer, error=GenerationCancelled()))
    return answer
