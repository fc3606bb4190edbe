"""FairQueue: whose turn it is. Decisions only.

    higher priorities first; within a priority the clients take turns, one request each;
    within a client first come, first served

A priority that was passed over PATIENCE times gets a turn, so that a flood of urgent requests delays the
others but never stops them. A turn is one request, whatever its length: what a prompt will cost depends on how
much of it is cached when it runs, and charging an agent for its whole history would punish the cheapest requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

PATIENCE = 16
"""So many turns of higher priorities may pass a lower one over before it gets one."""


class _Lane(Generic[T]):
    """The clients of one priority, whose turn it is first."""

    __slots__ = ("clients", "passed_over")

    def __init__(self) -> None:
        self.clients: OrderedDict[Hashable, OrderedDict[T, None]] = OrderedDict()
        self.passed_over = 0

    def next(self) -> T:
        return next(iter(next(iter(self.clients.values()))))


class FairQueue(Generic[T]):
    """Who waits, and who of them is next. Every operation is O(number of priorities), whatever the length."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane[T]] = {}
        self._places: OrderedDict[T, tuple[Hashable, int]] = OrderedDict()

    def __repr__(self) -> str:
        clients = sum(len(lane.clients) for lane in self._lanes.values())
        return f"<FairQueue {len(self)} of {clients} clients, {len(self._lanes)} priorities>"

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        """In the order of arrival."""
        return iter(self._places)

    def push(self, item: T, client: Hashable, priority: int) -> None:
        """`item` waits behind those of its client and priority."""
        lane = self._lanes.setdefault(priority, _Lane())
        lane.clients.setdefault(client, OrderedDict())[item] = None
        self._places[item] = (client, priority)

    def next(self) -> T:
        """Who is to be served next. Changes nothing."""
        return self._lanes[self._turn()].next()

    def take(self, item: T) -> None:
        """`item` is served: its client goes behind the others of its priority, which has had its turn."""
        client, priority = self._places[item]
        self._lanes[priority].passed_over = 0
        self._lanes[priority].clients.move_to_end(client)
        self.remove(item)
        for other, lane in self._lanes.items():
            lane.passed_over += other < priority

    def remove(self, item: T) -> None:
        """`item` waits no more and was not served: its client keeps its turn."""
        client, priority = self._places.pop(item)
        lane = self._lanes[priority]
        del lane.clients[client][item]
        if not lane.clients[client]:
            del lane.clients[client]
        if not lane.clients:
            del self._lanes[priority]

    def clear(self) -> None:
        self._lanes.clear()
        self._places.clear()

    def _turn(self) -> int:
        overdue = [priority for priority, lane in self._lanes.items() if lane.passed_over >= PATIENCE]
        if not overdue:
            return max(self._lanes)
        return max(overdue, key=lambda priority: (self._lanes[priority].passed_over, priority))
