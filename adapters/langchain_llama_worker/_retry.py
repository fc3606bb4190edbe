"""RetryPolicy: when the caller's side tries again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from llama_worker import QueueFull, WorkerDied

T = TypeVar("T")

_LONGEST = 5.0  # seconds that a caller waits for a worker to be started anew
_backoff = wait_random_exponential(multiplier=0.1, max=2.0)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Up to `max_retries` further attempts, for what a later attempt can mend and nothing else.

    That is a full queue, and with `restarts` (the worker is the registry's) a worker that died: then the
    next attempt waits until the registry starts another, unless that is too far away.
    """

    max_retries: int
    restarts: bool

    def run(self, attempt: Callable[[], T]) -> T:
        return Retrying(**self._settings)(attempt)

    async def arun(self, attempt: Callable[[], Awaitable[T]]) -> T:
        async def awaited() -> T:  # tenacity awaits only what it knows for a coroutine function
            return await attempt()

        return await AsyncRetrying(**self._settings)(awaited)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "stop": stop_after_attempt(1 + self.max_retries),
            "wait": _pause,
            "retry": retry_if_exception(self._is_worth_it),
            "reraise": True,
        }

    def _is_worth_it(self, error: BaseException) -> bool:
        if isinstance(error, WorkerDied):
            return self.restarts and _retry_after(error) <= _LONGEST
        return isinstance(error, QueueFull)


def _pause(attempt: RetryCallState) -> float:
    error = None if attempt.outcome is None else attempt.outcome.exception()
    return max(_backoff(attempt), _retry_after(error))


def _retry_after(error: BaseException | None) -> float:
    return (error.retry_after or 0.0) if isinstance(error, WorkerDied) else 0.0
