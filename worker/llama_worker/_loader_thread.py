"""The one thread of a worker that loads its models.

It is kept between two loads, for glibc gives each new thread whichever heap is free: a thread for each load
would leave the remains of a model in one heap after another, and the process would grow with every reload.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from llama_worker._parking import crash_of, guarded

_LOOK = 0.2  # seconds between two looks at whether the thread was given up


class Launch(Protocol):
    """Has functions run, one after another: on a thread of their own, or at once (tests)."""

    def __call__(self, run: Callable[[], None]) -> Errand | None: ...

    def close(self) -> None:
        """Nothing more will be run. Blocks until the thread has ended, unless it is parked."""


class Errand:
    """One function on its way through the thread."""

    def __init__(self, run: Callable[[], None], thread: threading.Thread) -> None:
        self.thread = thread
        self._run = run
        self._done = threading.Event()

    def __call__(self) -> None:
        try:
            self._run()
        finally:
            self._done.set()

    def is_alive(self) -> bool:
        return not self._done.is_set()

    def join(self, timeout: float) -> None:
        """Wait for its end, at most `timeout` seconds."""
        self._done.wait(timeout)


class LoaderThread:
    """A Launch. Used by the worker thread only. `contain`: the thread is parked if native code crashes on it."""

    def __init__(self, *, contain: bool = False) -> None:
        self._contain = contain
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, run: Callable[[], None]) -> Errand:
        """Run `run` after what is under way. Never blocks."""
        thread = self._thread
        if thread is None or crash_of(thread) is not None:
            thread = self._start()
        errand = Errand(guarded(run) if self._contain else run, thread)
        self._errands.put(errand)
        return errand

    def close(self) -> None:
        """See Launch."""
        thread, self._thread = self._thread, None
        self._errands.put(None)
        while thread is not None and thread.is_alive() and crash_of(thread) is None:
            thread.join(_LOOK)

    def _start(self) -> threading.Thread:
        self._errands = queue.SimpleQueue()  # a parked thread keeps the old one
        # A daemon, for the reason that the worker thread is one.
        self._thread = threading.Thread(target=_run_all, args=(self._errands,), name="llama-worker-loader", daemon=True)
        self._thread.start()
        return self._thread


def _run_all(errands: queue.SimpleQueue[Errand | None]) -> None:
    while (errand := errands.get()) is not None:
        errand()
        del errand  # or the last model would live until the next one
