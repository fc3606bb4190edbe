"""CommandChannel: the one way to the worker thread. Bounded, closable; what it accepts is answered.

The contract: a command that was accepted is handed to the worker or handed out by `close`, completely
before or completely after the close, never lost. One lock makes that true.

Only requests count against the capacity: a channel that can refuse Shutdown or Reload cannot be stopped
or mended. A caller that finds no room leaves a Ticket, in order of arrival; when the worker takes a
request, the first ticket's request moves up and its owner is woken. So waiting needs no polling, works
for threads and event loops alike, and nobody overtakes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from llama_worker._commands import Control, Request


class Ticket:
    """A place in the line before a full channel. `wake` is called once, by any thread, when `settled`."""

    __slots__ = ("accepted", "closed", "request", "wake")

    def __init__(self, request: Request, wake: Callable[[], object]) -> None:
        self.request = request
        self.wake = wake
        self.accepted = False
        self.closed = False

    @property
    def is_settled(self) -> bool:
        return self.accepted or self.closed


class CommandChannel:
    """A mailbox with many senders and one receiver, the worker thread."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._controls: deque[Control] = deque()
        self._requests: deque[Request] = deque()
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()  # re-entrant: a finalizer may say Shutdown anywhere
        self._nudged = False
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<CommandChannel {state} [{len(self._requests)}/{self.capacity} queued, {len(self._tickets)} waiting]>"

    @property
    def queued(self) -> int:
        return len(self._requests)

    @property
    def has_controls(self) -> bool:
        return bool(self._controls)

    @property
    def waiting(self) -> int:
        """Callers that wait for room."""
        return len(self._tickets)

    def offer(self, ticket: Ticket, *, wait: bool = True) -> None:
        """Accept the ticket's request if there is room; else, with `wait`, keep the ticket until there is.

        Never blocks. A closed channel marks the ticket `closed`. `wake` is not called for what is settled here.
        """
        with self._changed:
            if self._closed:
                ticket.closed = True
            elif len(self._requests) < self.capacity and not self._tickets:
                self._accept(ticket)
            elif wait:
                self._tickets.append(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """Give up the place, unless the ticket is settled already: look at it afterwards."""
        with self._changed:
            if not ticket.is_settled:
                self._tickets.remove(ticket)

    def command(self, control: Control) -> bool:
        """Accept a Reload or Shutdown; False when the channel is closed. Never blocks, never refuses."""
        with self._changed:
            if not self._closed:
                self._controls.append(control)
                self._changed.notify()
            return not self._closed

    def nudge(self) -> None:
        """Let a waiting worker look around. Any thread."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    # -- the worker's side ------------------------------------------------------------------------

    def wait(self, timeout: float) -> None:
        """Block until there is a command, or for `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._controls or self._requests or self._nudged), timeout)
            self._nudged = False

    def controls(self) -> Iterator[Control]:
        """The controls that are queued now, each removed only when the next is asked for."""
        for _ in range(len(self._controls)):
            yield self._controls[0]
            self._controls.popleft()

    def peek(self) -> Request:
        """The request to serve next, still in the channel. Only the worker takes requests out, so `queued` holds."""
        return self._requests[0]

    def drop(self, request: Request) -> None:
        """`request` is in another container now, or answered. The first ticket moves up."""
        with self._changed:
            self._requests.remove(request)
            if self._tickets:
                ticket = self._tickets.popleft()
                self._accept(ticket)
                ticket.wake()

    def requests(self) -> list[Request]:
        """All queued requests, oldest first."""
        with self._changed:
            return list(self._requests)

    def close(self) -> tuple[list[Request], list[Control]]:
        """Refuse from now on; settle the tickets as closed; hand out everything unanswered. Idempotent."""
        with self._changed:
            self._closed = True
            tickets, requests, controls = list(self._tickets), list(self._requests), list(self._controls)
            for queue in (self._tickets, self._requests, self._controls):
                queue.clear()
            for ticket in tickets:
                ticket.closed = True
        for ticket in tickets:
            ticket.wake()
        return requests, controls

    def _accept(self, ticket: Ticket) -> None:
        ticket.accepted = True
        self._requests.append(ticket.request)
        self._changed.notify()
