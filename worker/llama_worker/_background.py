"""Background: a daemon thread of the process that does one kind of work, so that nobody else's thread has to."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_all: weakref.WeakSet[Background[Any]] = weakref.WeakSet()


class Background(Generic[T]):
    """Calls `work` with each item, in the order of `add`, on a thread that `start` starts. `work` must not raise.

    A forked child has none of its parent's items, and a thread of its own as soon as it calls `start`.
    """

    def __init__(self, name: str, work: Callable[[T], object]) -> None:
        self._name = name
        self._work = work
        self.started = False
        self._forget()
        _all.add(self)

    def start(self) -> None:
        """Have the thread ready. Idempotent; any thread."""
        with self._starting:
            if not self.started:
                self.started = True
                threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def add(self, item: T) -> None:
        """Any thread; never blocks. Somebody has called `start` before."""
        self._items.put(item)

    def _forget(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self.started = False

    def _run(self) -> None:
        items, work = self._items, self._work
        while True:
            item = items.get()
            work(item)
            del item  # or what it refers to would live until the next one


def _after_fork() -> None:
    for background in list(_all):
        background._forget()  # the parent's thread is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
