"""llama.cpp's log, forwarded to `logging.getLogger("llama_worker.llama_cpp")`.

llama.cpp may log from any thread and in pieces of lines; each thread's pieces are joined apart. A thread
may hold its lines back while a call runs whose failure is reported by its return code.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import Final

logger = logging.getLogger("llama_worker.llama_cpp")
# Without a handler of the application's own, Python would print warnings to stderr.
logger.addHandler(logging.NullHandler())

# As in ggml.h; the binding's own table is another, and takes every notice for a warning.
_LEVELS: Final = {0: logging.DEBUG, 1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED: Final = 5


class ThreadLog:
    """The unfinished line of one thread, and the lines that it holds back."""

    __slots__ = ("_spare", "held", "level", "pending")

    def __init__(self) -> None:
        self.level = logging.INFO
        self.pending = ""
        self.held: deque[tuple[int, str]] | None = None
        self._spare: deque[tuple[int, str]] = deque(maxlen=100)

    def add(self, level: int, text: str) -> None:
        if level != _CONTINUED:
            self.flush()
            self.level = _LEVELS.get(level, logging.INFO)
        self.pending += text
        if self.pending.endswith("\n"):
            self.flush()

    def flush(self) -> None:
        line, self.pending = self.pending.rstrip(), ""
        if not line.strip("."):  # nothing, or a progress bar
            return
        if self.level < logging.ERROR and not logger.isEnabledFor(self.level):
            return
        if self.held is None:
            logger.log(self.level, "%s", line)
        else:
            self.held.append((self.level, line))

    def hold(self) -> None:
        """Hold this thread's lines back until `release`. Once per decode, so it makes nothing new."""
        self.held = self._spare

    def release(self, *, expected: bool) -> None:
        """Forward the held lines; those of an expected outcome only for debugging."""
        if self.pending:
            self.flush()
        self.held = None
        while self._spare:
            level, line = self._spare.popleft()
            logger.log(logging.DEBUG if expected else level, "%s", line)


class _Local(threading.local):
    def __init__(self) -> None:
        self.log = ThreadLog()


_local = _Local()


def thread_log() -> ThreadLog:
    """What the calling thread logs."""
    return _local.log


def _forward(level: int, text: bytes | None, _user_data: int | None) -> None:
    with contextlib.suppress(Exception):
        _local.log.add(level, (text or b"").decode("utf-8", "replace"))


forward_log: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_forward)
"""The callback for llama_log_set. Any thread; never raises."""


@contextlib.contextmanager
def collected_log() -> Iterator[deque[tuple[int, str]]]:
    """Collect what this thread logs, newest last, and forward it at the end."""
    lines: deque[tuple[int, str]] = deque(maxlen=2000)
    log = thread_log()
    outer, log.held = log.held, lines
    try:
        yield lines
    finally:
        log.flush()
        log.held = outer
        for level, line in lines:
            logger.log(level, "%s", line)


def error_lines(lines: deque[tuple[int, str]], limit: int = 3) -> str:
    """The last errors among collected lines, for a message."""
    errors = [line for level, line in lines if level >= logging.ERROR]
    return "; ".join(errors[-limit:]) or "llama.cpp gave no reason"
