"""The postman: one thread of the process that hands events to waiting threads, so that no worker has to.

Waking a thread is a call into the kernel, which with eight readers cost the worker thread as much as half
its own work on eight tokens. It wakes one instead, which wakes the others while the next decode runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from llama_worker._background import Background

Letter: TypeAlias = tuple[Callable[[Any], object], Any]


def _deliver(letter: Letter) -> None:
    deliver, event = letter
    deliver(event)


_postman: Background[Letter] = Background("llama-worker-postman", _deliver)


def start() -> None:
    """Have the postman ready. Idempotent; any thread."""
    _postman.start()


def post(deliver: Callable[[Any], object], event: object) -> None:
    """Have `deliver(event)` called, in the order of the calls of `post`; it must not block or raise.

    Any thread; never blocks. Somebody has called `start` before.
    """
    _postman.add((deliver, event))
