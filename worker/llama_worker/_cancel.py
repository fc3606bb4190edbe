"""Cancelling: a flag for each request, and a scope that cancels whatever is submitted beneath it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class CancelFlag:
    """Whether one request was cancelled or has expired. Idempotent, non-blocking, for any thread.

    The side that waits or computes for the request *arms* the flag with a wake-up: the worker with the
    engine's abort flag during a decode, a caller in a full channel with its own event. Setting the flag
    stores first and reads the wake-up second, arming stores the wake-up first and reads the flag second;
    so one of the two always sees the other, and a wake-up that comes late is at worst spurious.
    """

    __slots__ = ("__weakref__", "_wake", "cancelled", "expired")

    def __init__(self) -> None:
        self.cancelled = False
        self.expired = False
        self._wake: Callable[[], object] | None = None

    @property
    def is_set(self) -> bool:
        return self.cancelled or self.expired

    def cancel(self) -> None:
        """The caller wants no more of this request."""
        self.cancelled = True
        self._call()

    def expire(self) -> None:
        """The request's deadline has passed."""
        self.expired = True
        self._call()

    def arm(self, wake: Callable[[], object]) -> None:
        """Call `wake`, which must not block, when the flag is set; at once if it is set already."""
        self._wake = wake
        if self.cancelled or self.expired:
            wake()

    def disarm(self, wake: Callable[[], object] | None = None) -> None:
        """Call nothing any more. With `wake`, only if that is what is armed: another side may have taken over."""
        if wake is None or self._wake is wake:
            self._wake = None

    def _call(self) -> None:
        wake = self._wake
        if wake is not None:
            wake()


class CancelScope:
    """Cancels every request that was or will be submitted inside its `with` block. For any thread."""

    def __init__(self, deadline: float | None = None) -> None:
        self.cancelled = False
        self._expires = None if deadline is None else time.monotonic() + deadline
        self._flags: weakref.WeakSet[CancelFlag] = weakref.WeakSet()
        self._lock = threading.Lock()

    @property
    def expires(self) -> float | None:
        """The moment, in time.monotonic(), at which requests in this scope time out."""
        return self._expires

    def cancel(self) -> None:
        """Cancel what runs in this scope now, and whatever is submitted in it later. Never blocks."""
        with self._lock:
            self.cancelled = True
            flags = list(self._flags)
        for flag in flags:
            flag.cancel()

    def add(self, flag: CancelFlag) -> None:
        """Put one request's flag under this scope."""
        with self._lock:
            self._flags.add(flag)
            cancelled = self.cancelled
        if cancelled:
            flag.cancel()


_scopes: ContextVar[tuple[CancelScope, ...]] = ContextVar("llama_worker_cancel_scopes", default=())


@contextmanager
def cancel_scope(deadline: float | None = None) -> Iterator[CancelScope]:
    """A scope for everything that is submitted in the `with` block, through any framework between.

    It travels by contextvars, so it reaches requests made by agents, chains, query engines and chat
    engines, also in the threads and tasks that these start. `deadline` is in seconds from now and
    ends requests with DeadlineExceeded. Leaving the block does not cancel.
    """
    scope = CancelScope(deadline)
    token = _scopes.set((*_scopes.get(), scope))
    try:
        yield scope
    finally:
        _scopes.reset(token)


def new_flag(timeout: float | None) -> tuple[CancelFlag, float | None]:
    """A flag under the current scopes, and the earliest deadline in time.monotonic()."""
    flag = CancelFlag()
    scopes = _scopes.get()
    for scope in scopes:
        scope.add(flag)
    limits = [scope.expires for scope in scopes if scope.expires is not None]
    if timeout is not None:
        limits.append(time.monotonic() + timeout)
    return flag, min(limits, default=None)


def seconds_left(deadline: float | None) -> float | None:
    """Seconds until `deadline` in time.monotonic(), 0.0 when it has passed; None for no deadline."""
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)
