"""Sessions that are cancelled at random points go on as if they had not been; faults of the engine reach who asks."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import pytest

from llama_worker import GenerationCancelled, LlamaWorker, LlamaWorkerError, Message, WorkerDied, cancel_scope
from llama_worker._engine.base import DecodeStatus, Span, StateError
from llama_worker.testing import FakeEngine, Fault, fake_loader, fake_worker

ROUNDS = 1000 if os.environ.get("LLAMA_WORKER_PROOF") else 100
TEXTS = [f"{word} and what was said about it " * 9 for word in ("stone", "lamp", "river", "boat")]
ROLES = ("system", "user", "assistant")


class Watched:
    """A worker over a fake engine, whose books are checked before each decode, and whose calls may be cut short."""

    def __init__(self, kind: str) -> None:
        self.left = 0
        self.cut: Callable[[], object] = lambda: None
        loader = fake_loader(hybrid=kind == "hybrid", seen=lambda engine: self._watch(engine, kind))
        self.worker = fake_worker(loader=loader, n_ctx=4096, n_kv_cells=4096, n_parallel=2, n_ubatch=64, n_batch=64)

    def _watch(self, engine: FakeEngine, kind: str) -> None:
        inner = engine.decode
        if kind == "window":
            engine.limits = replace(engine.limits, can_trim_restored=False)

        def decode(spans: Sequence[Span]) -> DecodeStatus:
            loaded = self.worker._service.loaded
            assert loaded is not None
            loaded.scheduler.cache.check()
            for slot in loaded.scheduler.cache.slots:
                assert engine.held(slot.seq) == slot.tokens.view.tolist()
            self.left -= 1
            if not self.left:
                self.cut()
            return inner(spans)

        engine.decode = decode  # type: ignore[method-assign]


@lru_cache(maxsize=4096)
def alone(key: tuple[tuple[str, str], ...]) -> str:
    with fake_worker(n_ctx=4096, n_parallel=1) as worker:
        return worker.generate([Message(role=role, content=text) for role, text in key], max_tokens=4).text  # type: ignore[arg-type]


def conversation(rng: random.Random) -> list[Message]:
    """Few texts, so that beginnings come again."""
    return [Message(role=ROLES[min(i, 1 + i % 2)], content=rng.choice(TEXTS)) for i in range(rng.randint(1, 5))]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["plain", "window", "hybrid"])
def test_cancelled_at_random_points_they_go_on_as_if_they_had_not_been(kind: str):
    rng = random.Random(kind)
    watched, cancelled = Watched(kind), 0
    with watched.worker as worker:
        sessions = [worker.session(f"{i}") for i in range(3)]
        for _ in range(ROUNDS):
            session, messages = rng.choice(sessions), conversation(rng)
            at = rng.randint(1, len(messages))
            with cancel_scope() as scope:
                watched.cut, watched.left = scope.cancel, rng.randint(1, 12)
                try:
                    session.ensure_prefix(messages[:at])
                    session.prefill_suffix(messages[at:])
                    session.decode(max_tokens=4).reply()
                except GenerationCancelled:
                    cancelled += 1
            watched.left = 0
            session.ensure_prefix(messages[:at])
            status = session.prefill_suffix(messages[at:])
            reply = session.decode(max_tokens=4).reply()
            assert reply.usage.cached_tokens >= status.resident - 1
            assert reply.text == alone(tuple((message.role, message.content) for message in messages))
    assert cancelled > ROUNDS / 5


def ask(worker: LlamaWorker) -> list[str]:
    said = []
    with worker.session() as session:
        for system in (TEXTS[0], TEXTS[1], TEXTS[0]):
            session.ensure_prefix([Message(role="system", content=system)])
            session.prefill_suffix([Message(role="user", content=TEXTS[2])])
            said.append(session.decode(max_tokens=2).reply().text)
    return said


def unhurt(hybrid: bool = False) -> list[str]:
    with fake_worker(loader=fake_loader(hybrid=hybrid), n_ctx=1024, n_parallel=1) as worker:
        return ask(worker)


@pytest.mark.parametrize("call", ["decode", "seq_end", "seq_trim", "seq_clear", "seq_share", "new_sampler", "sample"])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_engine_that_breaks_is_told_to_the_caller(call: str, nth: int):
    """Where the call is made at all: nobody hangs, and what comes is WorkerDied."""
    engines: list[FakeEngine] = []
    loader = fake_loader(faults=[Fault(call, RuntimeError("it broke"), nth)], seen=engines.append)  # type: ignore[arg-type]
    with fake_worker(loader=loader, n_ctx=1024, n_parallel=1) as worker:
        try:
            raised, said = None, ask(worker)
        except LlamaWorkerError as error:
            raised = error
        if engines[0].calls.count(call) >= nth:
            assert isinstance(raised, WorkerDied)
        else:
            assert said == unhurt()


@pytest.mark.parametrize("call", ["seq_save", "seq_restore"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_state_that_cannot_be_kept_costs_no_session(call: str, hybrid: bool):
    loader = fake_loader(hybrid=hybrid, faults=[Fault(call, StateError("no"), nth) for nth in (1, 2, 3)])  # type: ignore[arg-type]
    with fake_worker(loader=loader, n_ctx=1024, n_parallel=1) as worker:
        assert ask(worker) == unhurt(hybrid)


@pytest.mark.parametrize("status", [DecodeStatus.KV_FULL, DecodeStatus.ABORTED])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_decode_that_does_not_succeed_at_once_is_done_again(status: DecodeStatus, nth: int):
    loader = fake_loader(faults=[Fault("decode", status, nth)])
    with fake_worker(loader=loader, n_ctx=2048, n_parallel=2) as worker:
        assert ask(worker) == unhurt()
        assert worker.metrics().decode_errors[status.name.lower()] == 1


def test_what_an_aborted_decode_computed_is_not_computed_again():
    rows = []
    for faults in ([], [Fault("decode", DecodeStatus.ABORTED, 2)]):
        engines: list[FakeEngine] = []
        loader = fake_loader(faults=faults, seen=engines.append)
        with fake_worker(loader=loader, n_ctx=2048, n_parallel=1, n_ubatch=64, n_batch=64) as worker:
            worker.generate(TEXTS[0], max_tokens=4, ignore_eos=True)
        rows.append(engines[0].n_rows)
    assert rows[1] == rows[0]
