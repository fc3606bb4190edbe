"""Admission: how a caller gets its request accepted, waiting for room if need be.

Sync callers wait on an event of their own, async callers on a future of their loop: without a thread, and
without blocking anybody. Whatever ends the wait early (deadline, cancel, Ctrl-C, a cancelled task) takes
the request out of the line, or cancels it if it was accepted in that very moment.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Literal

from llama_worker._cancel import seconds_left
from llama_worker._channel import CommandChannel, Ticket
from llama_worker._commands import Request
from llama_worker._errors import DeadlineExceeded, GenerationCancelled, QueueFull
from llama_worker._loop_door import bell


class Admission:
    """The callers' side of one channel. Any thread.

    `on_full`: "wait" for room, or "reject" with QueueFull. `why_closed` gives the error to raise when
    the channel is closed.
    """

    def __init__(
        self, channel: CommandChannel, on_full: Literal["wait", "reject"], why_closed: Callable[[], Exception]
    ) -> None:
        self._channel = channel
        self.on_full = on_full
        self._why_closed = why_closed

    @property
    def would_refuse(self) -> bool:
        """Whether a request that came now would be refused for want of room."""
        return self.on_full == "reject" and self._channel.is_full

    def put(self, request: Request) -> None:
        """Blocks until `request` is accepted. Raises QueueFull, WorkerClosed, DeadlineExceeded, GenerationCancelled."""
        woken = threading.Event()
        ticket = self._offer(request, woken.set)
        try:
            if not ticket.is_settled:
                woken.wait(seconds_left(request.deadline))
        except BaseException:
            request.cancel.cancel()
            raise
        finally:
            self._leave(ticket)
        self._conclude(ticket)

    async def aput(self, request: Request) -> None:
        """The async twin of `put`."""
        woken, wake = bell()
        ticket = self._offer(request, wake)
        try:
            if not ticket.is_settled:
                await asyncio.wait([woken], timeout=seconds_left(request.deadline))
        except BaseException:
            request.cancel.cancel()
            raise
        finally:
            self._leave(ticket)
        self._conclude(ticket)

    def _offer(self, request: Request, wake: Callable[[], object]) -> Ticket:
        ticket = Ticket(request, wake)
        # Before the offer: once it is accepted the flag is the worker's to arm.
        request.cancel.arm(wake)
        wait = self.on_full == "wait"
        self._channel.offer(ticket, wait=wait)
        if not (wait or ticket.is_settled):
            raise QueueFull(self._channel.capacity)
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        ticket.request.cancel.disarm(ticket.wake)
        self._channel.withdraw(ticket)

    def _conclude(self, ticket: Ticket) -> None:
        if ticket.accepted:
            return
        if ticket.closed:
            raise self._why_closed()
        if ticket.request.cancel.cancelled:
            raise GenerationCancelled()
        raise DeadlineExceeded(ticket.request.job.request.timeout)
