"""A worker without a thread: a Service over a FakeEngine that a test drives step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from llama_worker import (
    EmbedRequest,
    Failed,
    Finished,
    Message,
    ModelConfig,
    StreamEvent,
)
from llama_worker._cancel import CancelFlag
from llama_worker._channel import CommandChannel, Ticket
from llama_worker._commands import Embed, Generate, Reload, Shutdown
from llama_worker._loop import end, step
from llama_worker._preparer import Preparer
from llama_worker._prompts import generation_request
from llama_worker._published import Published
from llama_worker._record import Record
from llama_worker._reloading import begin_loading
from llama_worker._service import Service
from llama_worker.testing import FakeEngine, assert_well_formed, fake_loader


class ListSink:
    """Keeps a request's events."""

    def __init__(self) -> None:
        self.events: list[StreamEvent] = []

    def put(self, event: StreamEvent) -> None:
        self.events.append(event)

    @property
    def is_answered(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)

    @property
    def terminal(self) -> Finished | Failed:
        return assert_well_formed(self.events)

    @property
    def text(self) -> str:
        return self.terminal.text


class AtOnce:
    """Loads on the test's own thread."""

    def __call__(self, run: Callable[[], None]) -> None:
        run()

    def close(self) -> None:
        pass


class Bench:
    """One worker on the test's own thread. `clock` is moved by hand."""

    def __init__(
        self, *replies: str, loader: Any = None, capacity: int = 64, step_budget_ms: float = 100.0, **config: Any
    ) -> None:
        self.engines: list[FakeEngine] = []
        self.now = 0.0
        self.published = Published()
        self.channel = CommandChannel(capacity)
        self.config = ModelConfig(**{"model": "fake://model", **config})
        self.service = Service(
            channel=self.channel,
            loader=loader or fake_loader(*replies, seen=self.engines.append),
            config=self.config,
            step_budget_ms=step_budget_ms,
            preparer=Preparer(),
            publish=self.published.show,
            clock=lambda: self.now,
            launch=AtOnce(),
        )

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    @property
    def scheduler(self) -> Any:
        assert self.service.loaded is not None
        return self.service.loaded.scheduler

    def load(self) -> Bench:
        begin_loading(self.service, self.config)
        while self.service.loaded is None:
            assert step(self.service)
        return self

    def ask(
        self, prompt: str | Sequence[Message], *, deadline: float | None = None, **params: Any
    ) -> tuple[ListSink, CancelFlag]:
        command = self.request(prompt, deadline=deadline, **params)
        self.put(command)
        assert isinstance(command.sink, ListSink)
        return command.sink, command.cancel

    def request(self, prompt: str | Sequence[Message], *, deadline: float | None = None, **params: Any) -> Generate:
        """A prepared request that is nowhere yet."""
        view = self.published.view(0)
        assert view is not None
        job = view.prepare_generation(generation_request(prompt, None, {"max_tokens": 16, **params}))
        record = Record(self.service.meter.answered)
        return Generate(
            job=job, sink=ListSink(), cancel=CancelFlag(), deadline=deadline, submitted=self.now, record=record
        )

    def embed(self, *texts: str, normalize: bool = True) -> tuple[Future[list[list[float]]], CancelFlag]:
        view = self.published.view(0)
        assert view is not None
        request = EmbedRequest(texts=texts, normalize=normalize)
        answer: Future[list[list[float]]] = Future()
        cancel = CancelFlag()
        job, record = view.prepare_embedding(request), Record(self.service.meter.answered)
        self.put(Embed(job=job, answer=answer, cancel=cancel, deadline=None, submitted=self.now, record=record))
        return answer, cancel

    def reload(
        self, when: str = "drain", timeout: float | None = None, overlap: bool = False, **changes: Any
    ) -> Reload:
        config = ModelConfig(**{**self.config.model_dump(), **changes})
        noted = self.service.meter.reloaded
        command = Reload(config=config, when=when, timeout=timeout, overlap=overlap, noted=noted)  # type: ignore[arg-type]
        assert self.channel.command(command)
        return command

    def put(self, request: Generate | Embed) -> None:
        ticket = Ticket(request, lambda: None)
        self.channel.offer(ticket)
        assert ticket.accepted

    def step(self, times: int = 1) -> None:
        """`times` rounds; those after the first are left out where the worker would wait for something to do."""
        for done in range(times):
            if done and self._waits:
                return
            assert step(self.service)
            self.check()

    @property
    def _waits(self) -> bool:
        service, channel = self.service, self.channel
        busy = channel.has_controls or channel.queued or service.change is not None or service.transfers
        return not busy and service.loaded is not None and service.loaded.is_idle

    def settle(self, *waited_for: ListSink | Future[Any], most: int = 2000) -> None:
        """Step until all are answered."""
        for _ in range(most):
            if all(w.is_answered if isinstance(w, ListSink) else w.done() for w in waited_for):
                return
            self.step()
        raise AssertionError(f"not answered after {most} steps: {self.service}")

    def shut_down(self) -> None:
        self.channel.command(Shutdown())
        while step(self.service):
            pass
        end(self.service, None)

    def check(self) -> None:
        """The prefix cache's books are right, and they are what the engine holds."""
        engine = None if self.service.loaded is None else self.service.loaded.engine
        if not isinstance(engine, FakeEngine) or engine.closed:
            return
        self.scheduler.cache.check()
        for slot in self.scheduler.cache.slots:
            assert engine.held(slot.seq) == slot.tokens.view.tolist(), f"{slot} differs from the engine"
