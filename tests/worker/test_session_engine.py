"""Sessions on llama.cpp: they compute what a plain request computes, also after a cancel, on every kind of memory.

The comparisons are of the numeric tier (see test_checkpoints): a session's prompt is decoded in other batches than a
cold one. Its numbers hold here too: 0.01 for rounding, 0.02 and more for an error of one token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_worker import GenerationCancelled, LlamaWorker, Message, ModelConfig, cancel_scope
from llama_worker._engine.base import DecodeStatus, LoadedModel, Span
from llama_worker._engine.llama import load
from tests.worker.probe import Mistake, Probe, probed
from tests.worker.test_checkpoints import CHECKPOINTED, ERROR, HISTORY, MODELS, ROUNDING
from tests.worker.test_exactness import EXACT

pytestmark = pytest.mark.engine

SYSTEM = Message(role="system", content="you are a tool " * 20)
LONG = Message(role="system", content=" ".join(random.Random(5).choices(HISTORY.split(), k=1920)))
"""About 2,000 tokens: a checkpoint lies within."""
FAR_ROUNDING, FAR_ERROR = 0.001, 0.003
"""With the same chunks, and an error that lies 700 tokens back: measured 0.0005 at most, and 0.0035 at least."""
USER = Message(role="user", content=HISTORY * 6)
REPLY = Message(role="assistant", content="(as said) light and water")
MORE = Message(role="user", content="and now?")


class Interrupting(Probe):
    """Calls `act` on the worker's thread before its decode number `at`, from 1."""

    at = 0
    act: Callable[[], object] = staticmethod(lambda: None)
    n = 0

    def decode(self, spans: list[Span]) -> DecodeStatus:  # type: ignore[override]
        self.n += 1
        if self.n == self.at:
            self.act()
        status = super().decode(spans)
        self.n_aborted += self.n == self.at
        return status


class Run:
    """A worker with its own thread over a model, watched."""

    def __init__(self, path: Path, mistake: Mistake | None = None, **config: Any) -> None:
        self.probes: list[Probe] = []
        settings = {"n_ctx": 4096, "n_parallel": 4, "n_threads": 1, **config}
        self.worker = LlamaWorker(ModelConfig(model=str(path), **settings), loader=self._loader(mistake))

    def _loader(self, mistake: Mistake | None) -> Callable[[ModelConfig], LoadedModel]:
        inner = probed(load, self.probes, mistake)

        def loading(config: ModelConfig) -> LoadedModel:
            loaded = inner(config)
            self.probes[-1].__class__ = Interrupting
            return loaded

        return loading

    def interrupt(self, at: int, act: Callable[[], object]) -> None:
        """Before the decode that is number `at` from now."""
        probe = self.probes[-1]
        assert isinstance(probe, Interrupting)
        probe.n, probe.at, probe.act = 0, at, act  # type: ignore[method-assign]


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def open_run(kind: str, mistake: Mistake | None = None, **config: Any) -> Run:
        fixture, settings = MODELS[kind]
        runs.append(Run(request.getfixturevalue(fixture), mistake, **settings, **config))
        return runs[-1]

    yield open_run
    for run in runs:
        run.worker.close()


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def difference(one: Any, other: Any) -> float:
    """Of the log-probabilities of two replies' first tokens, over the alternatives that both name."""
    a, b = ({token: p for token, _, p in reply.logprobs[0].top} for reply in (one, other))
    common = a.keys() & b.keys()
    assert common
    return max(abs(a[token] - b[token]) for token in common)


def asked(worker: LlamaWorker, messages: list[Message]) -> Any:
    return worker.generate(messages, max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=20)


def decoded(session: Any) -> Any:
    return session.decode(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=20).reply()


def test_a_prefix_grows_by_what_is_new_in_it(kind: str, opened: Callable[..., Run]):
    run = opened(kind)
    session = run.worker.session()
    first = session.ensure_prefix([SYSTEM])
    second = session.ensure_prefix([SYSTEM, USER])
    assert (first.reused, second.reused, second.dropped) == (0, first.resident, 0)
    again = session.ensure_prefix([SYSTEM, USER])
    assert (again.prefilled, again.resident) == (0, second.resident)


def test_its_reply_is_that_of_a_cold_request(kind: str, opened: Callable[..., Run]):
    run, cold = opened(kind), opened(kind)
    session = run.worker.session()
    session.ensure_prefix([SYSTEM])
    decoded(session)
    status = session.prefill_suffix([USER, REPLY, MORE])
    reply = decoded(session)
    assert reply.usage.cached_tokens == reply.usage.prompt_tokens - 1 == status.resident
    assert difference(reply, asked(cold.worker, [SYSTEM, USER, REPLY, MORE])) <= ROUNDING
    shorter = session.prefill_suffix([MORE])
    assert shorter.reused >= session.explain().prefix
    assert difference(decoded(session), asked(cold.worker, [SYSTEM, MORE])) <= ROUNDING


def continued(run: Run, *, interrupted: bool) -> tuple[int, Any]:
    """How much of a long prefix was there after its sixth chunk of eight was aborted, and a reply to what follows."""
    session = run.worker.session()
    if interrupted:
        with cancel_scope() as scope:
            run.interrupt(6, scope.cancel)
            with pytest.raises(GenerationCancelled):
                session.ensure_prefix([LONG])
        assert session.manifest is None
    status = session.ensure_prefix([LONG])
    assert status.prefilled == status.resident - status.reused
    session.prefill_suffix([MORE])
    return status.reused, decoded(session)


def test_what_follows_a_cancel_is_as_if_there_had_been_none(kind: str, opened: Callable[..., Run]):
    chunks = {"n_batch": 256, "n_ubatch": 256}
    reused, reply = continued(opened(kind, **chunks), interrupted=True)
    assert reused >= (1000 if kind in CHECKPOINTED else 1280)
    _, uninterrupted = continued(opened(kind, **chunks), interrupted=False)
    assert difference(reply, uninterrupted) <= FAR_ROUNDING


def test_an_error_of_one_token_after_a_cancel_shows(kind: str, opened: Callable[..., Run]):
    chunks = {"n_batch": 256, "n_ubatch": 256}
    _, reply = continued(opened(kind, "shifted after abort", **chunks), interrupted=True)
    _, uninterrupted = continued(opened(kind, **chunks), interrupted=False)
    assert difference(reply, uninterrupted) > FAR_ERROR


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_an_error_of_one_token_shows(kind: str, opened: Callable[..., Run]):
    run, cold = opened(kind, "shifted span"), opened(kind)
    session = run.worker.session()
    session.ensure_prefix([SYSTEM])
    session.prefill_suffix([USER, REPLY, MORE])
    assert difference(decoded(session), asked(cold.worker, [SYSTEM, USER, REPLY, MORE])) > ERROR


def test_in_the_exact_tier_the_ids_are_the_same(tiny_llama_q8: Path):
    texts = []
    for with_session in (True, False):
        run = Run(tiny_llama_q8, **EXACT)
        with run.worker as worker:
            if with_session:
                session = worker.session()
                session.ensure_prefix([LONG])
                session.prefill_suffix([MORE])
                stream = session.decode(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
            else:
                stream = worker.stream([LONG, MORE], max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
            texts.append([(logprob.token, logprob.logprob) for logprob in stream.reply().logprobs])
    assert texts[0] == texts[1]


def test_tokens_one_by_one_are_those_of_a_reply(kind: str, opened: Callable[..., Run]):
    run, cold = opened(kind), opened(kind)
    text = "one two three four five water light night " * 10
    ids = [1, *run.worker.tokenize(text)]
    session = run.worker.session()
    session.prefill(ids[:40])
    status = session.prefill(ids[40:])
    assert status.reused >= 38
    first = session.decode_one(temperature=0.0, ignore_eos=True)
    reply = cold.worker.session()
    reply.prefill(ids)
    whole = reply.decode(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=5).reply()
    near = {token: p for token, _, p in whole.logprobs[0].top}
    assert first in near
    assert near[first] >= max(near.values()) - ROUNDING


def test_a_reload_to_the_same_model_costs_the_prefix_again(tiny_llama: Path):
    with Run(tiny_llama).worker as worker, worker.session() as session:
        first = session.ensure_prefix([SYSTEM])
        worker.reload(n_parallel=2)
        status = session.prefill_suffix([USER])
        assert status.reused == 0
        assert status.prefilled > first.resident
