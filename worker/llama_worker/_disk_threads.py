"""The threads of this process that wait for disks, so that neither a decode nor an event loop does.

One for what a request waits for, one for what nobody waits for, writes above all: a read never stands behind them.
Folders are opened by threads of their own, since that may take as long as reading a whole model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from llama_worker._background import Background
from llama_worker._commands import settle

A = TypeVar("A")
B = TypeVar("B")


def _call(work: Callable[[], object]) -> None:
    work()


_reads: Background[Callable[[], object]] = Background("llama-worker-reads", _call)
_writes: Background[Callable[[], object]] = Background("llama-worker-writes", _call)


def begin(work: Callable[[], A], answer: Future[A] | None = None) -> Future[A]:
    """Do `work` on the thread for writes. Never blocks; any thread. The future gets what it returns or raises."""
    promised: Future[A] = answer or Future()

    def run() -> None:
        try:
            settle(promised, result=work())
        except Exception as exc:  # noqa: BLE001  it belongs to whoever asked
            settle(promised, error=exc)

    _writes.start()
    _writes.add(run)
    return promised


def begin_reading(work: Callable[[], object]) -> None:
    """Do `work`, which must not raise, on the thread for reads. Never blocks; any thread."""
    _reads.start()
    _reads.add(work)


def begin_alone(work: Callable[[], object]) -> None:
    """Do `work`, which must not raise, on a thread of its own. Never blocks; any thread."""
    threading.Thread(target=work, name="llama-worker-opens", daemon=True).start()


def then(first: Future[A], work: Callable[[A], B]) -> Future[B]:
    """Do `work` with the result of `first`, on the thread for writes, once it is there. Never blocks; any thread."""
    answer: Future[B] = Future()
    first.add_done_callback(lambda done: begin(lambda: work(done.result()), answer))
    return answer
