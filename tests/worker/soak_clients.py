"""The clients of the soak: each asks again and again, in another way each time, and checks every answer."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from llama_worker import (
    AsyncEventStream,
    CancelScope,
    DeadlineExceeded,
    EventStream,
    Failed,
    Finished,
    GenerationCancelled,
    LlamaWorker,
    Reply,
    StreamEvent,
    Usage,
    cancel_scope,
)
from llama_worker.testing import assert_well_formed

LATE: Final = 10.0  # seconds after its deadline at which an answer counts as hung
N_TASKS: Final = 4  # that each event loop runs at once
_TEXTS: Final = [chr(ord("a") + i) * (8 + 26 * i) for i in range(12)]
# Their lengths lie so far apart that an answer to one cannot pass for an answer to another.
PROMPTS: Final = [text if i % 3 == 0 else [{"role": "user", "content": text}] for i, text in enumerate(_TEXTS)]
_KEPT: Final = 64  # streams whose mailboxes are looked into again at the end


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and how many tokens it may have: one number for each model."""

    prompt: Any
    counts: frozenset[int]


class Journal:
    """What became of every request: each is begun once and ended once. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.begun: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.tokens = 0
        self.longest = 0.0
        self.faults: list[str] = []

    @property
    def lost(self) -> int:
        return self.begun.total() - self.ended.total()

    def seen(self, *outcomes: str) -> int:
        """How many requests ended in one of these ways."""
        return sum(n for (_, outcome), n in self.ended.items() if outcome in outcomes)

    def begin(self, kind: str) -> float:
        with self._lock:
            self.begun[kind] += 1
        return time.monotonic()

    def end(self, kind: str, outcome: str, begun: float) -> None:
        with self._lock:
            self.ended[kind, outcome] += 1
            self.longest = max(self.longest, time.monotonic() - begun)

    def fault(self, kind: str, exc: BaseException) -> None:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        with self._lock:
            self.faults.append(f"{kind}: {type(exc).__name__}: {exc} ({where.filename}:{where.lineno})")

    def check(self, question: Question, usage: Usage) -> None:
        """The usage is that of an answer to this question."""
        with self._lock:
            self.tokens += usage.completion_tokens
        if usage.completion_tokens:
            assert usage.prompt_tokens in question.counts, f"{usage.prompt_tokens} is none of {question.counts}"

    def check_end(self, question: Question, events: Sequence[StreamEvent], *, expected: tuple[str, ...]) -> str:
        end = assert_well_formed(events)
        self.check(question, end.usage)
        outcome = type(end.error).__name__ if isinstance(end, Failed) else end.reason
        assert outcome in expected, f"{outcome} is none of {expected}: {end.error if isinstance(end, Failed) else ''}"
        return outcome


WHOLE: Final = ("stop", "length")
CUT: Final = (*WHOLE, "cancelled")
TIMED: Final = (*WHOLE, "DeadlineExceeded")


def check_vectors(vectors: Sequence[Sequence[float]], n: int, widths: frozenset[int]) -> str:
    assert len(vectors) == n, f"{len(vectors)} vectors for {n} texts"
    assert all(len(vector) in widths for vector in vectors)
    assert all(abs(math.hypot(*vector) - 1.0) < 1e-3 for vector in vectors), "a vector is not of length 1"
    return "embedded"


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What all clients share. `scopes` are there for anybody to cancel."""

    worker: LlamaWorker
    journal: Journal
    questions: Sequence[Question]
    widths: frozenset[int]
    stop: threading.Event
    scopes: deque[CancelScope] = field(default_factory=deque)

    def cancel_somebody(self) -> None:
        if self.scopes:
            with suppress(IndexError):
                self.scopes.popleft().cancel()


class Client:
    """What a thread and a task have in common: its dice, and the streams that it has read."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.worker, self.journal = stage, stage.worker, stage.journal
        self.rng = random.Random(seed)
        self._read: deque[EventStream | AsyncEventStream] = deque(maxlen=_KEPT)

    def question(self) -> Question:
        return self.rng.choice(self.stage.questions)

    def sampling(self) -> dict[str, Any]:
        return {"max_tokens": self.rng.randrange(1, 24), "temperature": self.rng.choice([0.0, 0.9])}

    def long_sampling(self) -> dict[str, Any]:
        return {"max_tokens": 100, "ignore_eos": True}

    def texts(self) -> list[str]:
        return ["hello world " * self.rng.randrange(1, 6) for _ in range(self.rng.randrange(1, 5))]

    def check_reply(self, question: Question, reply: Reply) -> str:
        self.journal.check(question, reply.usage)
        assert reply.finish_reason in WHOLE
        return reply.finish_reason

    def check_late(self, begun: float, timeout: float) -> str:
        assert time.monotonic() - begun < timeout + LATE, "answered long after its deadline"
        return "DeadlineExceeded"

    def check_vectors(self, vectors: Sequence[Sequence[float]], texts: Sequence[str]) -> str:
        return check_vectors(vectors, len(texts), self.stage.widths)

    def ended(self, stream: EventStream | AsyncEventStream) -> None:
        self._read.append(stream)

    def check_nothing_came_after_the_end(self) -> None:
        for stream in self._read:
            if leftover(stream) is not None:
                self.journal.faults.append("an event came after the terminal one")


def leftover(stream: EventStream | AsyncEventStream) -> StreamEvent | None:
    mailbox = stream._mailbox
    if isinstance(stream, EventStream):
        return mailbox.get(0)  # type: ignore[union-attr, return-value]
    return mailbox._events[0] if mailbox is not None and mailbox._events else None  # type: ignore[union-attr]


class ThreadClient(Client):
    """Asks from a thread of its own."""

    def run(self) -> None:
        acts: Mapping[str, Callable[[], str]] = {
            "generate": self.generate,
            "stream": self.stream,
            "cancel": self.cancel,
            "cancel a scope": self.cancel_scope,
            "drop": self.drop,
            "time out": self.time_out,
            "embed": self.embed,
        }
        while not self.stage.stop.is_set():
            self.stage.cancel_somebody()
            kind = self.rng.choice(list(acts))
            begun = self.journal.begin(kind)
            outcome = "fault"
            try:
                outcome = acts[kind]()
            except Exception as exc:  # noqa: BLE001  the journal shows it
                self.journal.fault(kind, exc)
            self.journal.end(kind, outcome, begun)
        self.check_nothing_came_after_the_end()

    def generate(self) -> str:
        question = self.question()
        return self.check_reply(question, self.worker.generate(question.prompt, **self.sampling()))

    def stream(self) -> str:
        question = self.question()
        stream = self.worker.stream(question.prompt, **self.sampling())
        outcome = self.journal.check_end(question, list(stream), expected=WHOLE)
        self.ended(stream)
        return outcome

    def cancel(self) -> str:
        question, after = self.question(), self.rng.randrange(6)
        stream = self.worker.stream(question.prompt, **self.long_sampling())
        events: list[StreamEvent] = []
        if after == 0:
            stream.close()
        for event in stream:
            events.append(event)
            if len(events) == after:
                stream.close()
        self.ended(stream)
        return self.journal.check_end(question, events, expected=CUT)

    def cancel_scope(self) -> str:
        question = self.question()
        with cancel_scope() as scope:
            self.stage.scopes.append(scope)
            try:
                return self.check_reply(question, self.worker.generate(question.prompt, **self.long_sampling()))
            except GenerationCancelled as cancelled:
                if cancelled.partial is not None:
                    self.journal.check(question, cancelled.partial.usage)
                return "cancelled"

    def drop(self) -> str:
        stream = self.worker.stream(self.question().prompt, **self.long_sampling())
        for _ in range(self.rng.randrange(4)):
            next(stream)
        return "dropped"

    def time_out(self) -> str:
        question, timeout = self.question(), self.rng.uniform(0.001, 0.1)
        begun = time.monotonic()
        try:
            return self.check_reply(
                question, self.worker.generate(question.prompt, timeout=timeout, **self.long_sampling())
            )
        except DeadlineExceeded:
            return self.check_late(begun, timeout)

    def embed(self) -> str:
        texts = self.texts()
        return self.check_vectors(self.worker.embed(texts), texts)


class TaskClient(Client):
    """Asks from a task; several of them share an event loop."""

    async def run(self) -> None:
        acts: Mapping[str, Callable[[], Coroutine[Any, Any, str]]] = {
            "agenerate": self.agenerate,
            "astream": self.astream,
            "acancel": self.acancel,
            "cancel a task": self.cancel_task,
            "adrop": self.adrop,
            "atime out": self.atime_out,
            "aembed": self.aembed,
        }
        while not self.stage.stop.is_set():
            self.stage.cancel_somebody()
            kind = self.rng.choice(list(acts))
            begun = self.journal.begin(kind)
            outcome = "fault"
            try:
                outcome = await acts[kind]()
            except Exception as exc:  # noqa: BLE001  the journal shows it
                self.journal.fault(kind, exc)
            self.journal.end(kind, outcome, begun)
        self.check_nothing_came_after_the_end()

    async def agenerate(self) -> str:
        question = self.question()
        return self.check_reply(question, await self.worker.agenerate(question.prompt, **self.sampling()))

    async def astream(self) -> str:
        question = self.question()
        stream = self.worker.astream(question.prompt, **self.sampling())
        outcome = self.journal.check_end(question, [event async for event in stream], expected=WHOLE)
        self.ended(stream)
        return outcome

    async def acancel(self) -> str:
        question, after = self.question(), self.rng.randrange(1, 6)
        stream = self.worker.astream(question.prompt, **self.long_sampling())
        events: list[StreamEvent] = []
        async for event in stream:
            events.append(event)
            if len(events) == after:
                stream.close()
        self.ended(stream)
        return self.journal.check_end(question, events, expected=CUT)

    async def cancel_task(self) -> str:
        question = self.question()
        task = asyncio.create_task(self.worker.agenerate(question.prompt, **self.long_sampling()))
        await asyncio.wait([task], timeout=self.rng.uniform(0, 0.05))
        task.cancel()
        try:
            return self.check_reply(question, await task)
        except asyncio.CancelledError:
            return "cancelled"

    async def adrop(self) -> str:
        stream = self.worker.astream(self.question().prompt, **self.long_sampling())
        for _ in range(self.rng.randrange(4)):
            await anext(stream)
        return "dropped"

    async def atime_out(self) -> str:
        question, timeout = self.question(), self.rng.uniform(0.001, 0.1)
        begun = time.monotonic()
        stream = self.worker.astream(question.prompt, timeout=timeout, **self.long_sampling())
        try:
            events = [event async for event in stream]
        except DeadlineExceeded:  # before it was accepted
            return self.check_late(begun, timeout)
        end = events[-1]
        self.ended(stream)
        if isinstance(end, Finished):
            return self.journal.check_end(question, events, expected=WHOLE)
        self.check_late(begun, timeout)
        return self.journal.check_end(question, events, expected=TIMED)

    async def aembed(self) -> str:
        texts = self.texts()
        return self.check_vectors(await self.worker.aembed(texts), texts)
