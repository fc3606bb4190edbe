"""Preparer: the one thread beside the worker. It prepares what must not be prepared where it was asked for.

Async callers, because rendering and tokenizing a long prompt would block their event loop; and requests
that a reload made stale, because preparing them on the worker thread would delay every generation.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from llama_worker._commands import Generate, Request, settle
from llama_worker._errors import WorkerClosed
from llama_worker._view import ModelView

T = TypeVar("T")


class Preparer:
    """A daemon thread, started with the first task, that runs tasks one after another.

    `why_closed` makes the error of a task that comes too late.
    """

    def __init__(self, why_closed: Callable[[], Exception] = WorkerClosed) -> None:
        self._why_closed = why_closed
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outcomes: deque[tuple[Request, Request | Exception]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Run `task` on the preparer's thread. Never blocks, any thread."""
        answer: Future[T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                settle(answer, result=task())
            except Exception as exc:  # noqa: BLE001  it belongs to whoever asked
                settle(answer, error=exc)

        self._enqueue(run, answer)
        return answer

    def renew(self, request: Request, view: ModelView, done: Callable[[], None]) -> None:
        """Prepare `request` again, for `view`; the outcome waits for `collect`, and `done` is called."""

        def run() -> None:
            try:
                self._outcomes.append((request, prepared_again(request, view)))
            except Exception as exc:  # noqa: BLE001  it belongs to the request
                self._outcomes.append((request, exc))
            done()

        self._enqueue(run, None)

    def collect(self) -> Iterator[tuple[Request, Request | Exception]]:
        """The outcomes of `renew` so far, each once."""
        while self._outcomes:
            yield self._outcomes.popleft()

    def close(self) -> None:
        """Take no more tasks. Those that wait are still run: they answer somebody."""
        with self._lock:
            self._closed = True
            if self._thread is not None:
                self._tasks.put(None)

    def _enqueue(self, run: Callable[[], None], answer: Future[T] | None) -> None:
        with self._lock:
            if not self._closed:
                self._tasks.put(run)
                self._start()
                return
        if answer is not None:
            settle(answer, error=self._why_closed())

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._tasks,), name="llama-worker-preparer", daemon=True
            )
            self._thread.start()


def prepared_again(request: Request, view: ModelView) -> Request:
    """`request` with a job for `view`. Raises RequestError when it no longer fits."""
    if isinstance(request, Generate):
        again = request.job.again
        return replace(request, job=again(view) if again else view.prepare_generation(request.job.request))
    return replace(request, job=view.prepare_embedding(request.job.request))


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # or the last task's callers would live until the next one
