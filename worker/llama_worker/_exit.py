"""Leaving the interpreter: abort what runs, say Shutdown, and wait a moment for each worker thread.

Worker threads are daemons, because Python joins the others before atexit runs and an unclosed worker
would keep the process alive for ever. A daemon in the middle of a decode must not meet the libraries'
own exit handlers either, so it is given a moment to come out.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref

from llama_worker._commands import Shutdown
from llama_worker._service import Service

PATIENCE = 1.5  # seconds, for all workers together

_live: weakref.WeakKeyDictionary[threading.Thread, weakref.ref[Service]] = weakref.WeakKeyDictionary()


def watch(service: Service, thread: threading.Thread) -> None:
    """See to it that this worker ends with the process."""
    _live[thread] = weakref.ref(service)


def interrupt(service: Service) -> None:
    """Tell a worker to end, and abort what it is computing. Never blocks."""
    service.channel.command(Shutdown())
    abort = service.abort
    if abort is not None:
        abort()


@atexit.register
def _leave() -> None:
    threads = [thread for thread in list(_live) if thread.is_alive()]
    for thread in threads:
        service = _live[thread]()
        if service is not None:
            interrupt(service)
    until = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0.0))
