"""Waiting for what other threads do, without sleeping."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any


def in_thread(task: Callable[[], Any]) -> Callable[[], Any]:
    """Run `task` in a thread that inherits the context; call the result to join: its value or exception."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(task())
        except Exception as exc:  # noqa: BLE001  the test looks at it
            result.append(exc)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()

    def join() -> Any:
        thread.join(60)
        assert not thread.is_alive(), "a caller hangs"
        return result[0]

    return join


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Look again and again, for what another thread is about to do."""
    until = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        pause.wait(0.001)


async def until(condition: Callable[[], object]) -> None:
    """`wait_until`, which holds up no loop."""
    await asyncio.to_thread(wait_until, condition)
