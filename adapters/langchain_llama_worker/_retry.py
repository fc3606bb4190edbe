"""RetryPolicy: when the caller's side tries again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tenacity import AsyncRetrying, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from llama_worker import QueueFull, WorkerDied

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Up to `max_retries` further attempts, for what a later attempt can mend and nothing else.

    That is a full queue, and with `restarts` (the worker is the registry's) a worker that died.
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
            "wait": wait_random_exponential(multiplier=0.1, max=2.0),
            "retry": retry_if_exception_type((QueueFull, WorkerDied) if self.restarts else QueueFull),
            "reraise": True,
        }
