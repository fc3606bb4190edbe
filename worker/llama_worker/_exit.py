"""The end of a worker that nobody closed: it was dropped, or the interpreter leaves.

Leaving: abort what runs, say Shutdown, and wait a moment for each worker thread. Worker threads are
daemons, because Python joins the others before atexit runs and an unclosed worker would keep the process
alive for ever. A daemon in the middle of a decode must not meet the libraries' own exit handlers either,
so it is given a moment to come out.

Dropped: the same, in the background. The next model waits until the memory of those that leave is free, or
"open another one" would need memory for two.

A forked child has the parent's workers and none of their threads: it may not touch them, since a lock
that some thread held at the fork is held for ever.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait

from llama_worker._commands import Shutdown
from llama_worker._service import Service

PATIENCE = 1.5  # seconds, for all workers together
LONGEST_FAREWELL = 5.0  # seconds that a model waits for the memory of those that leave

_live: weakref.WeakKeyDictionary[threading.Thread, weakref.ref[Service]] = weakref.WeakKeyDictionary()
_leaving: list[Future[None]] = []


def watch(service: Service, thread: threading.Thread) -> None:
    """See to it that this worker ends with the process."""
    _live[thread] = weakref.ref(service)


def interrupt(service: Service) -> None:
    """Tell a worker to end, and abort what it is computing. Never blocks."""
    service.channel.command(Shutdown())
    abort = service.abort
    if abort is not None:
        abort()


def let_go(service: Service, pid: int) -> None:
    """The last user of a worker dropped it in the process `pid`, or in a child of it. Never blocks."""
    if os.getpid() == pid:
        leaves(service.freed)
        interrupt(service)


def leaves(freed: Future[None]) -> None:
    """A worker is on its way out; when `freed` is settled its memory is free. Never blocks."""
    _leaving.append(freed)
    freed.add_done_callback(_leaving.remove)


def await_leaving() -> None:
    """Blocks until the workers that are leaving now are gone, for LONGEST_FAREWELL at most."""
    wait(_leaving.copy(), LONGEST_FAREWELL)


_afterwards: list[Callable[[], object]] = []


def after_leaving(call: Callable[[], object]) -> None:
    """Have `call` called at exit, when the worker threads have come out; in the order of these calls."""
    _afterwards.append(call)


@atexit.register
def _leave() -> None:
    try:
        _leave_workers()
    finally:
        for call in _afterwards:
            call()


def _leave_workers() -> None:
    # In a forked child none of the threads is alive. One that is parked will never come out.
    found = [(thread, service()) for thread, service in list(_live.items()) if thread.is_alive()]
    leaving = [(thread, service) for thread, service in found if service is not None and not service.parked]
    for _, service in leaving:
        interrupt(service)
    until = time.monotonic() + PATIENCE
    for thread, _ in leaving:
        thread.join(max(until - time.monotonic(), 0.0))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leaving.clear)  # their threads will never settle anything here
