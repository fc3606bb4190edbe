"""Restarts: when a worker that died may be started anew."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tenacity import RetryCallState, Retrying, wait_exponential

LIMIT = 5
WITHIN = 60.0  # seconds

_pause = wait_exponential(multiplier=0.5, max=WITHIN)
_policy = Retrying(wait=_pause)


class Restarts:
    """The restarts of one configuration's worker: the first at once, then after 0.5, 1, 2, 4 s.

    There are at most LIMIT of them in any WITHIN seconds. Pauses are between one start and the next, so
    a worker that served for a while is restarted at once. Nothing here waits.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque()

    def __len__(self) -> int:
        """How many there were in the last WITHIN seconds."""
        self._forget()
        return len(self._times)

    def delay(self) -> float:
        """Seconds until the next one is allowed; 0.0 means now."""
        n = len(self)
        if n == 0:
            return 0.0
        allowed = self._times[0] + WITHIN if n >= LIMIT else self._times[-1] + _pause_after(n)
        return max(allowed - self._clock(), 0.0)

    def note(self) -> None:
        """One happens now."""
        self._times.append(self._clock())

    def _forget(self) -> None:
        while self._times and self._times[0] + WITHIN <= self._clock():
            self._times.popleft()


def _pause_after(n: int) -> float:
    attempt = RetryCallState(_policy, None, (), {})
    attempt.attempt_number = n
    return _pause(attempt)
