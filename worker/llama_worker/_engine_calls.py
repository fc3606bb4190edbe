"""EngineCalls: the long engine call that the worker thread is in, and who has the say over its end.

Only decode and embed are calls in this sense: what loads or frees a model takes as long as it takes. While
the worker is in such a call its containers stand still, so the watchdog may give the worker up and answer
everyone in its place. One lock decides between the two: either the call has ended, or it was abandoned, and
then the worker touches nothing any more, should it ever come back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Abandoned(Exception):
    """The engine call came back to a worker that was given up meanwhile; everyone has been answered."""


class EngineCall:
    """One call; `since` is the worker's clock at its beginning."""

    __slots__ = ("since",)

    def __init__(self, since: float) -> None:
        self.since = since


class EngineCalls:
    """The calls of one worker thread, one at a time. The worker begins and ends, the watchdog does the rest.

    `overdue`: the limit in seconds for which the last call was interrupted, None if it was not.
    `abandoned`: the worker was given up.
    """

    __slots__ = ("_lock", "abandoned", "current", "overdue")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.current: EngineCall | None = None
        self.overdue: float | None = None
        self.abandoned = False

    def begin(self, now: float) -> None:
        """The worker enters the engine."""
        self.overdue = None
        self.current = EngineCall(now)

    def end(self) -> None:
        """The worker is back. Raises Abandoned when it was given up meanwhile."""
        with self._lock:
            if self.abandoned:
                raise Abandoned
            self.current = None

    def interrupt(self, call: EngineCall, abort: Callable[[], None], limit: float | None) -> None:
        """Abort `call`, if the worker is still in it."""
        with self._lock:
            if self.current is call:
                self.overdue = limit
                abort()

    def abandon(self, call: EngineCall) -> bool:
        """Give up the worker that is in `call`. False when it is back already."""
        with self._lock:
            if self.current is call:
                self.abandoned = True
            return self.current is call
