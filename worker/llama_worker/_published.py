"""Published: the one value that the worker thread shows to everyone, and the wait for its first showing."""

from __future__ import annotations

import threading

from llama_worker._errors import WorkerClosed, copy_of
from llama_worker._view import ModelView


class Published:
    """The current ModelView, or the reason why there is none. Any thread."""

    def __init__(self) -> None:
        self._value: ModelView | Exception | None = None
        self._shown = threading.Event()

    def show(self, value: ModelView | Exception) -> None:
        self._value = value
        self._shown.set()

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

    def view(self, timeout: float | None = None) -> ModelView | None:
        """Wait for loading to end; the view, or None after `timeout` seconds. Raises why there is none."""
        if not self._shown.wait(timeout):
            return None
        value = self._value
        if isinstance(value, Exception):
            raise copy_of(value)
        return value
