"""What travels to the worker thread: Request (a generation or texts to embed), Reload, Shutdown."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from llama_worker._cancel import CancelFlag
from llama_worker._config import ModelConfig
from llama_worker._errors import GenerationCancelled
from llama_worker._events import Failed, Finished, StreamEvent, Usage
from llama_worker._jobs import EmbedJob, GenerationJob


def settle(answer: Future[Any], *, result: object = None, error: Exception | None = None) -> None:
    """Give `answer` its one result or error. A caller that cancelled the future meanwhile loses nothing."""
    with suppress(InvalidStateError):
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)


class EventSink(Protocol):
    """Where a generation's events go. `put` is called by any thread and must not block or raise."""

    def put(self, event: StreamEvent) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generate:
    """Serve `job` and put its events into `sink`."""

    job: GenerationJob
    sink: EventSink
    cancel: CancelFlag
    deadline: float | None

    def fail(self, error: Exception) -> None:
        """Answer before anything was generated."""
        self.sink.put(Failed(error=error, text="", usage=Usage()))

    def answer_cancelled(self) -> None:
        self.sink.put(Finished(reason="cancelled", text="", usage=Usage()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embed:
    """Serve `job`; `answer` gets one vector for each text, or an exception."""

    job: EmbedJob
    answer: Future[list[list[float]]]
    cancel: CancelFlag
    deadline: float | None

    def fail(self, error: Exception) -> None:
        settle(self.answer, error=error)

    def answer_cancelled(self) -> None:
        # Never Future.cancel(): an awaiting task would see a CancelledError that nobody asked for.
        settle(self.answer, error=GenerationCancelled())


Request: TypeAlias = Generate | Embed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reload:
    """Serve with `config` from now on. Running requests are drained, or cancelled at `deadline`."""

    config: ModelConfig
    when: Literal["drain", "now"]
    deadline: float | None
    answer: Future[None] = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        settle(self.answer, error=error)


@dataclass(frozen=True, slots=True, eq=False)
class Shutdown:
    """Answer everyone and end."""

    def fail(self, error: Exception) -> None:
        """Nobody waits for a Shutdown itself."""


Control: TypeAlias = Reload | Shutdown
