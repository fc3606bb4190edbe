"""Published: the one value that the worker thread shows to everyone, and the wait for its first showing."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

from llama_worker._cancel import CancelFlag
from llama_worker._commands import settle
from llama_worker._errors import GenerationCancelled, WorkerClosed, copy_of
from llama_worker._loop_door import bell
from llama_worker._view import ModelView


class Published:
    """The current ModelView, or the reason why there is none. Any thread."""

    def __init__(self) -> None:
        self._value: ModelView | Exception | None = None
        self._changed = threading.Condition()  # re-entrant: a finalizer may cancel anywhere
        self.first: Future[None] = Future()
        """Settled by the first showing, whatever is shown."""

    def show(self, value: ModelView | Exception) -> None:
        with self._changed:
            self._value = value
            self._changed.notify_all()
        settle(self.first)

    @property
    def current(self) -> ModelView | None:
        """The view if there is one now. Never blocks."""
        return self._value if isinstance(self._value, ModelView) else None

    @property
    def failure(self) -> Exception | None:
        return self._value if isinstance(self._value, Exception) else None

    def why_closed(self) -> Exception:
        """The error for a caller who finds the channel closed, a fresh one each time."""
        return WorkerClosed() if self.failure is None else copy_of(self.failure)

    def view(self, timeout: float | None = None, cancel: CancelFlag | None = None) -> ModelView | None:
        """Wait for loading to end; the view, or None after `timeout` seconds. Raises why there is none.

        Raises GenerationCancelled when `cancel` is set before there is one.
        """
        value = self._value
        if value is None:
            value = self._wait(timeout, cancel)
        if value is None and cancel is not None and cancel.cancelled:
            raise GenerationCancelled()
        if isinstance(value, Exception):
            raise copy_of(value)
        return value

    async def shown(self, timeout: float | None, cancel: CancelFlag | None = None) -> None:
        """Wait for the first showing, on any event loop. Raises TimeoutError; GenerationCancelled as `view` does."""
        rung, ring = bell()
        self.first.add_done_callback(lambda _: ring())
        if cancel is not None:
            cancel.arm(ring)
        try:
            await asyncio.wait_for(rung, timeout)
        finally:
            if cancel is not None:
                cancel.disarm(ring)
        if cancel is not None and cancel.cancelled:
            raise GenerationCancelled()

    def _wait(self, timeout: float | None, cancel: CancelFlag | None) -> ModelView | Exception | None:
        if cancel is not None:
            cancel.arm(self._look)
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._value is not None or (cancel is not None and cancel.is_set), timeout
                )
                return self._value
        finally:
            if cancel is not None:
                cancel.disarm(self._look)

    def _look(self) -> None:
        with self._changed:
            self._changed.notify_all()
