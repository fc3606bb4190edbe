"""What travels to the worker thread: Request (a generation or texts to embed), and controls: Reload and the like."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from llama_worker._cancel import CancelFlag
from llama_worker._config import ModelConfig
from llama_worker._entry import Entry
from llama_worker._errors import GenerationCancelled, InvalidRequestError
from llama_worker._events import Failed, Finished, StreamEvent, Terminal, Usage
from llama_worker._identity import BASE, KVIdentity
from llama_worker._jobs import EmbedJob, GenerationJob
from llama_worker._record import Answer, Record
from llama_worker._tokens import TokenIds


def settle(answer: Future[Any], *, result: object = None, error: Exception | None = None) -> None:
    """Give `answer` its one result or error. A caller that cancelled the future meanwhile loses nothing."""
    with suppress(InvalidStateError):
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)


class EventSink(Protocol):
    """Where a generation's events go. Both are called by any thread and must not block or raise."""

    def put(self, event: StreamEvent) -> None: ...

    def taken_while_waiting(self) -> int | None:
        """How many events the reader has taken so far; None while none waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generate:
    """Serve `job` and put its events into `sink`. `submitted` and `deadline` are moments of time.monotonic()."""

    job: GenerationJob
    sink: EventSink
    cancel: CancelFlag
    deadline: float | None
    submitted: float = field(default_factory=time.monotonic)
    record: Record = field(default_factory=Record)

    def end(self, event: Terminal) -> None:
        """Say the last word. Every terminal event goes this way, and is counted before it can be read."""
        self.record.end(Answer.of(event))
        self.sink.put(event)

    def fail(self, error: Exception) -> None:
        """Answer before anything was generated."""
        self.end(Failed(error=error, text="", usage=Usage()))

    def answer_cancelled(self) -> None:
        self.end(Finished(reason="cancelled", text="", usage=Usage(), model=self.job.model))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embed:
    """Serve `job`; `answer` gets one vector for each text, or an exception."""

    job: EmbedJob
    answer: Future[list[list[float]]]
    cancel: CancelFlag
    deadline: float | None
    submitted: float = field(default_factory=time.monotonic)
    record: Record = field(default_factory=Record)

    def succeed(self, vectors: object) -> None:
        n_tokens = sum(map(len, self.job.texts))
        self.record.end(Answer(usage=Usage(prompt_tokens=n_tokens), texts=len(self.job.texts)))
        settle(self.answer, result=vectors)

    def fail(self, error: Exception) -> None:
        self.record.end(Answer(usage=Usage(), error=error, texts=len(self.job.texts)))
        settle(self.answer, error=error)

    def answer_cancelled(self) -> None:
        # Never Future.cancel(): an awaiting task would see a CancelledError that nobody asked for.
        self.fail(GenerationCancelled())


Request: TypeAlias = Generate | Embed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reload:
    """Serve with `config` from now on. Running requests are drained, or cancelled when that took `timeout` seconds.

    `overlap`: load beside the old model. `progress` is called by the loading thread.
    """

    config: ModelConfig
    when: Literal["drain", "now"]
    timeout: float | None
    overlap: bool = False
    progress: Callable[[float], object] | None = None
    answer: Future[None] = field(default_factory=Future)
    noted: Callable[[Exception | None], object] | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequestError for what the worker thread could do nothing with."""
        if not isinstance(self.timeout, int | float | None) or not 0 <= (self.timeout or 0) <= threading.TIMEOUT_MAX:
            raise InvalidRequestError("timeout", self.timeout, "it is a number of seconds from 0 on, or None: no end")
        if self.progress is not None and not callable(self.progress):
            raise InvalidRequestError("progress", type(self.progress).__name__, "give a function of a number, or None")

    def end(self, error: Exception | None) -> None:
        """The new model serves, or `error` says why not; `noted` hears of it before the caller does."""
        if self.noted is not None and not self.answer.done():
            self.noted(error)
        settle(self.answer, error=error)

    def fail(self, error: Exception) -> None:
        self.end(error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChangeLora:
    """Serve the LoRA adapter in the file `path` under `name` from now on; None: no longer any under this name."""

    name: str
    path: str | None
    answer: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InvalidRequestError("name", type(self.name).__name__, "an adapter's name is a str")

    def fail(self, error: Exception) -> None:
        settle(self.answer, error=error)


@dataclass(frozen=True, slots=True, eq=False)
class Shutdown:
    """Answer everyone and end."""

    def fail(self, error: Exception) -> None:
        """Nobody waits for a Shutdown itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Export:
    """Copy what is kept for the model of `epoch`: as much of `tokens`, with `kv`, as there is, or, None, everything.

    `answer` gets the entries, those used longest ago first; OtherLoad where another one serves by now. With `tokens`
    it waits for an idle slot.
    """

    epoch: int
    tokens: TokenIds | None = None
    kv: KVIdentity = BASE
    answer: Future[tuple[Entry, ...]] = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        settle(self.answer, error=error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Import:
    """Keep `entries`, which are of the model of `epoch`, the most useful one last. `answer` gets how many are kept.

    Another load of the same files with the same settings, as `mark` tells, takes them too; others answer OtherLoad.
    """

    epoch: int
    entries: tuple[Entry, ...]
    mark: bytes | None = None
    answer: Future[int] = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        settle(self.answer, error=error)


Transfer: TypeAlias = Export | Import
Control: TypeAlias = Reload | ChangeLora | Transfer | Shutdown
