"""What goes wrong in a fake engine, and when: faults, a gate to hold it at, a flag to abort it with."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llama_worker._engine.base import DecodeStatus

Call: TypeAlias = Literal[
    "decode",
    "sample",
    "logits",
    "new_sampler",
    "seq_end",
    "seq_trim",
    "seq_clear",
    "seq_share",
    "seq_save",
    "seq_restore",
    "load_lora",
    "free_lora",
    "use_loras",
    "embed",
    "close",
]


@dataclass(slots=True)
class Fault:
    """Make the `nth` call (from 1) of one engine method go wrong.

    `how`: an exception to raise; a DecodeStatus that `decode` returns; or "hang": the call does not
    return until the abort flag is raised, as a decode that takes for ever.
    """

    call: Call
    how: Exception | DecodeStatus | Literal["hang"]
    nth: int = 1


class Gate:
    """Holds the engine before a decode, so that a test can look at a worker in the middle of its work."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()
        self._open.set()

    def shut(self) -> None:
        """Hold the next decode."""
        self._reached.clear()
        self._open.clear()

    def wait_reached(self, timeout: float = 10.0) -> None:
        """Wait until a decode is held. Raises TimeoutError."""
        if not self._reached.wait(timeout):
            raise TimeoutError("no decode came to the gate")

    def open(self) -> None:
        """Let the held decode, and all others, pass."""
        self._open.set()

    def _pass(self, abort: FakeAbortFlag) -> None:
        if not self._open.is_set():
            self._reached.set()
            while not self._open.wait(0.001):
                if abort.raised.is_set():
                    return


class FakeAbortFlag:
    """An AbortFlag that a hanging call can wait for."""

    def __init__(self) -> None:
        self.raised = threading.Event()

    def raise_(self) -> None:
        self.raised.set()

    def clear(self) -> None:
        self.raised.clear()
