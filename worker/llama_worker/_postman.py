"""The postman: one thread of the process that hands events to waiting threads, so that no worker has to.

Waking a thread is a call into the kernel, which with eight readers cost the worker thread as much as half
its own work on eight tokens. It wakes one instead, which wakes the others while the next decode runs.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

Letter: TypeAlias = tuple[Callable[[Any], object], Any]


class _Postman:
    """Calls what it is given, in order, on a thread of its own that starts with the first letter."""

    def __init__(self) -> None:
        self.letters: queue.SimpleQueue[Letter] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._started = False

    def start(self) -> None:
        with self._starting:
            if not self._started:
                self._started = True
                threading.Thread(
                    target=_deliver, args=(self.letters,), name="llama-worker-postman", daemon=True
                ).start()


def _deliver(letters: queue.SimpleQueue[Letter]) -> None:
    while True:
        deliver, event = letters.get()
        deliver(event)
        del deliver, event  # or the last reader's queue would live until the next letter


_postman = _Postman()


def start() -> None:
    """Have the postman ready. Idempotent; any thread."""
    _postman.start()


def post(deliver: Callable[[Any], object], event: object) -> None:
    """Have `deliver(event)` called, in the order of the calls of `post`; it must not block or raise.

    Any thread; never blocks. Somebody has called `start` before.
    """
    _postman.letters.put((deliver, event))


def _after_fork() -> None:
    global _postman  # the parent's thread is not in the child
    _postman = _Postman()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
