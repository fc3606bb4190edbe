"""CommandChannel: the one way to the worker thread. Bounded, closable; what it accepts is answered.

The contract: a command that was accepted is handed to the worker or handed out by `close`, completely
before or completely after the close, never lost. One lock makes that true.

Only requests count against the capacity: a channel that can refuse Shutdown or Reload cannot be stopped
or mended. A caller that finds no room leaves a Ticket; when the worker takes a request, the next ticket's
request moves up and its owner is woken. So waiting needs no polling and works for threads and event loops alike.

Requests and tickets alike are served by turns (`_fairness`): a client is the request's `session`, or else the
thread that submitted it, which for all tasks of an event loop is the loop's. So however many wait for one client,
another's single caller is the next but one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from llama_worker._commands import Control, Request
from llama_worker._fairness import FairQueue


class Ticket:
    """A place in the line before a full channel. `wake` is called once, by any thread, when `settled`.

    Made on the thread that submits: without a session, it is the client.
    """

    __slots__ = ("accepted", "client", "closed", "request", "wake")

    def __init__(self, request: Request, wake: Callable[[], object]) -> None:
        self.request = request
        self.client: str | int = request.job.request.session or threading.get_ident()
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
        self._requests: FairQueue[Request] = FairQueue()
        self._tickets: FairQueue[Ticket] = FairQueue()
        self._changed = threading.Condition()  # re-entrant: a finalizer may say Shutdown anywhere
        self._nudged = False
        self._closed = False
        self.n_accepted = 0
        self.n_refused = 0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<CommandChannel {state} [{len(self._requests)}/{self.capacity} queued, {len(self._tickets)} waiting]>"

    @property
    def queued(self) -> int:
        return len(self._requests)

    @property
    def is_full(self) -> bool:
        """Whether a caller that came now would have to wait."""
        return len(self._requests) >= self.capacity or bool(self._tickets)

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
                self._tickets.push(ticket, ticket.client, ticket.request.job.request.priority)
            else:
                self.n_refused += 1

    def withdraw(self, ticket: Ticket) -> None:
        """Give up the place, unless the ticket is settled already: look at it afterwards."""
        with self._changed:
            if not ticket.is_settled:
                self._tickets.remove(ticket)

    def command(self, control: Control) -> bool:
        """Accept a control; False when the channel is closed. Never blocks, never refuses."""
        with self._changed:
            if not self._closed:
                self._controls.append(control)
                self._changed.notify()
            return not self._closed

    def resize(self, capacity: int) -> None:
        """Hold so many requests from now on; those that are in stay. Callers that wait move up. Any thread."""
        with self._changed:
            self.capacity = capacity
            while self._tickets and len(self._requests) < capacity:
                self._move_up()

    def nudge(self) -> None:
        """Let a waiting worker look around. Any thread."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    # -- the worker's side ------------------------------------------------------------------------

    def wait(self, timeout: float) -> None:
        """Block until something came in since the last wait, or for `timeout` seconds.

        What has been in for longer does not count: the worker may have left it there, and would spin.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._controls or self._nudged), timeout)
            self._nudged = False

    def controls(self) -> Iterator[Control]:
        """The controls that are queued now, each removed only when the next is asked for."""
        for _ in range(len(self._controls)):
            yield self._controls[0]
            self._controls.popleft()

    def peek(self) -> Request:
        """The request to serve next, still in the channel. Only the worker takes requests out, so `queued` holds."""
        with self._changed:
            return self._requests.next()

    def take(self, request: Request) -> None:
        """`request`, which was peeked at, is in another container now: its client has had its turn."""
        with self._changed:
            self._requests.take(request)
            self._move_up()

    def drop(self, request: Request) -> None:
        """`request` was answered where it waited."""
        with self._changed:
            self._requests.remove(request)
            self._move_up()

    def requests(self) -> list[Request]:
        """All queued requests, oldest first."""
        with self._changed:
            return list(self._requests)

    def outside(self) -> list[Request]:
        """The requests of callers that wait for room, oldest first. Any thread."""
        with self._changed:
            return [ticket.request for ticket in self._tickets]

    def close(self) -> tuple[list[Request], list[Control]]:
        """Refuse from now on; settle the tickets as closed; hand out everything unanswered. Idempotent."""
        with self._changed:
            self._closed = True
            tickets, requests, controls = list(self._tickets), list(self._requests), list(self._controls)
            self._tickets.clear()
            self._requests.clear()
            self._controls.clear()
            for ticket in tickets:
                ticket.closed = True
        for ticket in tickets:
            ticket.wake()
        return requests, controls

    def _move_up(self) -> None:
        """There is room again: the next ticket's request comes in."""
        if self._tickets and len(self._requests) < self.capacity:
            ticket = self._tickets.next()
            self._tickets.take(ticket)
            self._accept(ticket)
            ticket.wake()

    def _accept(self, ticket: Ticket) -> None:
        ticket.accepted = True
        self.n_accepted += 1
        self._requests.push(ticket.request, ticket.client, ticket.request.job.request.priority)
        self._nudged = True
        self._changed.notify()
