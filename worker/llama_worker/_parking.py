"""Parking: a thread whose native code has crashed stops where it is, for ever, and the process lives on.

The thread can neither return, for the native code under it would abort the process, nor be unwound. So it
keeps what it owns, a model and its memory, and whoever waits for it is answered by the watchdog.

Only threads of workers that asked for it are parked, and threads that Python did not start: a native thread
that crashes while computing for a worker leaves that worker's thread waiting for it. Any other Python thread
is the application's; were it to vanish without a word, nobody would know why.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Crash:
    """What native code said when it crashed, and when, in time.monotonic()."""

    reason: str
    at: float


class _Lot:
    def __init__(self) -> None:
        self.guarded: set[int] = set()
        self.crashes: dict[int, Crash] = {}
        self.strays: list[Crash] = []


_lot: Final = _Lot()

news: Final = threading.Event()
"""Set whenever a thread was parked. Whoever waits for it clears it."""


def guarded(run: Callable[P, T]) -> Callable[P, T]:
    """`run`, whose thread is parked if native code crashes beneath it."""

    @functools.wraps(run)
    def guard(*args: P.args, **kwargs: P.kwargs) -> T:
        ident = threading.get_ident()
        outer = ident in _lot.guarded
        _lot.guarded.add(ident)
        try:
            return run(*args, **kwargs)
        finally:
            if not outer:
                _lot.guarded.discard(ident)

    return guard


def crash_of(thread: threading.Thread | None) -> Crash | None:
    """Why `thread` is parked; None when it is not."""
    return None if thread is None or thread.ident is None else _lot.crashes.get(thread.ident)


def stray_since(moment: float) -> Crash | None:
    """A crash at or after `moment` of a thread that Python did not start; it computed for some worker."""
    return next((crash for crash in reversed(_lot.strays) if crash.at >= moment), None)


def park_if_guarded(reason: str, *, strays: bool) -> None:
    """Called on a thread whose native code crashed: never returns if it is one to be parked.

    `strays`: so are threads that Python did not start.
    """
    ident = threading.get_ident()
    crash = Crash(reason, time.monotonic())
    if ident in _lot.guarded:
        _lot.crashes[ident] = crash
    elif strays and ident not in {thread.ident for thread in threading.enumerate()}:
        _lot.strays.append(crash)
    else:
        return
    news.set()
    _stop()


def _stop() -> NoReturn:
    # A signal would wake the thread, at worst while the interpreter ends and has no place for it.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    never = threading.Event()
    while True:
        never.wait()
