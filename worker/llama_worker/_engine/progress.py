"""LoadProgress: how far the load of a model is, and whether it is still wanted.

It travels by contextvar, so that a loader stays a function from a configuration to a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

logger = logging.getLogger("llama_worker")

Report: TypeAlias = Callable[[float], object]
"""Called with the fraction that is loaded, 0.0 to 1.0, by the loading thread. It must not block."""


class LoadProgress:
    """Watched by the loading thread, cancelled by any other."""

    def __init__(self, report: Report | None = None) -> None:
        self._report = report
        self._cancelled = False

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Nobody wants the model any more. Never blocks; the load ends at its next tensor."""
        self._cancelled = True

    def tell(self, fraction: float) -> bool:
        """Pass `fraction` on. False when the load should end."""
        if self._report is not None and not self._cancelled:
            try:
                self._report(fraction)
            except Exception:
                logger.exception("the progress callback of a load failed; it is not called again")
                self._report = None
        return not self._cancelled


class Share(LoadProgress):
    """A part of a `whole` load, from one fraction of it to another."""

    def __init__(self, whole: LoadProgress, first: float, last: float) -> None:
        super().__init__()
        self._whole, self._first, self._last = whole, first, last

    def tell(self, fraction: float) -> bool:
        return self._whole.tell(self._first + (self._last - self._first) * fraction)


_current: ContextVar[LoadProgress | None] = ContextVar("llama_worker_load_progress", default=None)


@contextmanager
def watched_by(progress: LoadProgress) -> Iterator[None]:
    """What is loaded in this block tells `progress`."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)


def current_progress() -> LoadProgress:
    """Who watches the load on this thread."""
    return _current.get() or LoadProgress()
