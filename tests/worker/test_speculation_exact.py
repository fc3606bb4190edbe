"""Drafts on the real engine: what is said is what would be said without them.

In the exact tier (see test_exactness) bit by bit, greedy and sampled; with the default cache within its rounding.
The drafts come from an oracle that knows the reply and is wrong now and then, for random weights repeat little.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_worker import LlamaWorker, ModelConfig
from llama_worker._engine.base import MOST_DRAFTS, DecodeStatus, Engine, Span
from llama_worker._engine.llama import load
from llama_worker._generation import Generation
from llama_worker._metrics import Metrics
from llama_worker._snapshots import metrics_of
from llama_worker._speculation import Drafter
from llama_worker._tokens import TokenBuffer, TokenIds, common_prefix
from tests import synth
from tests.constraint.walks import PROOF
from tests.worker.test_exactness import EXACT, WORDS, Run, same
from tests.worker.test_stress import cold_regrets

pytestmark = pytest.mark.engine

N = 60
Answer = tuple[list[int], np.ndarray]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    """The synthesised one, unless a test asks for another: with q8_0 K and V a run of SmolLM2 takes 15 seconds."""
    return request.getfixturevalue(getattr(request, "param", "tiny_llama_q8"))


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    """Somewhat more than 1,000 tokens of either model."""
    rng = np.random.default_rng(5)
    return " ".join(rng.choice(WORDS.split()) for _ in range(1050 if "Smol" in model.name else 420))


class Oracle(Drafter):
    """Knows the reply, and errs at every draft with the chance `wrong`."""

    def __init__(self, generation: Generation, reply: Sequence[int], wrong: float, seed: int = 0) -> None:
        super().__init__(TokenBuffer(), 1, always=True)
        self.generation, self.reply = generation, reply
        self.wrong = wrong
        self.random = random.Random(seed)

    @property
    def n_likely(self) -> int:
        return MOST_DRAFTS

    def propose(self, most: int) -> TokenIds:
        ahead = self.reply[self.generation.n_sampled :][: min(most, self.random.randrange(MOST_DRAFTS + 1))]
        return np.array([t ^ 1 if self.random.random() < self.wrong else t for t in ahead], np.int32)


def answers(
    model: Path,
    prompts: Sequence[str],
    known: Sequence[list[int]] | None = None,
    *,
    wrong: float = 0.15,
    config: dict[str, Any] | None = None,
    **params: Any,
) -> tuple[list[Answer], Metrics]:
    """The ids and logits of each prompt's reply; `known` are the replies that an oracle drafts."""
    settings = {"n_threads": 1, **(config or {})}
    with Run(model, speculation="off" if known is None else "on", **settings) as run:
        asked = {"max_tokens": N, "temperature": 0.0, "ignore_eos": True, **params}
        first = len(run.probe.samplers)
        sinks = [run.bench.ask(prompt, **asked)[0] for prompt in prompts]
        run.bench.step()
        by_order = sorted([*run.bench.scheduler.running, *run.bench.scheduler.waiting], key=lambda g: g.order)
        for i, generation in enumerate(by_order if known else []):
            generation.drafter = Oracle(generation, known[i], wrong, seed=i)  # type: ignore[index]
        run.bench.settle(*sinks)
        keys = [id(sampler) for sampler in run.probe.samplers[first:]]
        found = [(run.probe.chosen[key], np.stack(run.probe.logits_of[key])) for key in keys]
        return found, metrics_of(run.bench.service)


def ids_of(found: Sequence[Answer]) -> list[list[int]]:
    return [ids for ids, _ in found]


# -- the exact tier


GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 7}
PENALISED: dict[str, Any] = {"repeat_penalty": 1.3, "top_k": 5, "seed": 1}
EACH = [
    *[("tiny_llama_q8", params) for params in (GREEDY, SAMPLED, PENALISED)],
    *[pytest.param("smollm2_path", params, marks=pytest.mark.proof) for params in (GREEDY, SAMPLED)],
]


@pytest.mark.parametrize(("model", "params"), EACH, indirect=["model"])
def test_ids_and_logits_are_those_of_a_run_without_drafts(model: Path, text: str, params: dict[str, Any]) -> None:
    """Greedy, and sampled with one seed: a chain draws once for each token that is said, and no other."""
    (expected,), _ = answers(model, [text], **params)
    (found,), metrics = answers(model, [text], [expected[0]], **params)
    assert same(found, expected)
    assert metrics.accepted_drafts > N / 4
    assert metrics.drafted_tokens > metrics.accepted_drafts


@pytest.mark.parametrize("seed", range(30 if PROOF else 4))
def test_every_seed_draws_the_same(model: Path, text: str, seed: int) -> None:
    """Token for token the same sample, so the distributions are the same."""
    params = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed}
    (expected,), _ = answers(model, [text], **params)
    (found,), metrics = answers(model, [text], [expected[0]], wrong=0.3, **params)
    assert same(found, expected)
    assert metrics.accepted_drafts


def test_several_sequences_draft_at_once(model: Path, text: str) -> None:
    prompts = [f"{name} {text} {name}?" for name in ("one", "two", "three")]
    expected = [answers(model, [prompt])[0][0] for prompt in prompts]
    found, metrics = answers(model, prompts, ids_of(expected))
    assert all(any(same(answer, reference) for answer in found) for reference in expected)
    assert metrics.accepted_drafts > N / 2


def one_too_many(a: TokenIds, b: TokenIds) -> int:
    return min(common_prefix(a, b) + 1, len(a), len(b))


@pytest.mark.parametrize(
    "model", ["tiny_llama_q8", pytest.param("smollm2_path", marks=pytest.mark.proof)], indirect=True
)
def test_one_draft_too_many_is_found(model: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,), _ = answers(model, [text])
    monkeypatch.setattr("llama_worker._decoding.common_prefix", one_too_many)
    (found,), _ = answers(model, [text], [expected[0]])
    assert not same(found, expected)


def test_a_sampler_that_hears_of_drafts_is_found(model: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain may draw for said tokens only: once more, and the seed leads elsewhere."""
    from llama_worker import _decoding

    params = {"temperature": 1.5, "top_k": 0, "seed": 3}
    (expected,), _ = answers(model, [text], **params)
    sample_span: Callable[..., None] = _decoding._sample_span

    def drawn_twice(service: Any, loaded: Any, row: int, span: Span, generation: Generation) -> None:
        loaded.engine.inner.sample(row, generation.sampler)
        sample_span(service, loaded, row, span, generation)

    monkeypatch.setattr(_decoding, "_sample_span", drawn_twice)
    (found,), _ = answers(model, [text], [expected[0]], **params)
    assert not same(found, expected)


def test_rows_of_one_span_are_those_of_single_decodes(model: Path, text: str) -> None:
    """The engine's own part of it: the logits of the last rows of a span, and only of those."""
    engine = load(ModelConfig(model=str(model), n_ctx=4096, speculation="on", **{**EXACT, "n_threads": 1})).engine  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, synth.N_VOCAB, 1200).astype(np.int32)
    for seq in (0, 1):
        assert engine.decode([Span(seq, 0, tokens[:1190], False)]) is DecodeStatus.OK
    alone = []
    for at in range(1190, 1200):
        assert engine.decode([Span(0, at, tokens[at : at + 1], True)]) is DecodeStatus.OK
        alone.append(engine.logits(0).copy())
    assert engine.decode([Span(1, 1190, tokens[1190:], 8)]) is DecodeStatus.OK
    for row in range(2, 10):
        assert np.array_equal(engine.logits(row), alone[row])
    for row in (0, 1, 10):
        with pytest.raises(ValueError, match=f"row={row}:"):
            engine.logits(row)
    engine.close()


def test_more_outputs_than_rows_or_room_are_refused(tiny_llama: Path) -> None:
    engine = load(ModelConfig(model=str(tiny_llama), n_ctx=256, n_parallel=2, n_threads=1, speculation="on")).engine
    tokens = np.arange(300, 330, dtype=np.int32)
    assert engine.limits.n_outputs == 2 + MOST_DRAFTS
    for span in (Span(0, 0, tokens[:3], 4), Span(0, 0, tokens[:3], -1), Span(0, 0, tokens, 18)):
        with pytest.raises(ValueError, match="output"):
            engine.decode([span])
    assert engine.decode([Span(0, 0, tokens, 17)]) is DecodeStatus.OK
    engine.close()


# -- with the default cache


def worst_regret(engine: Engine, prompt: TokenIds, ids: Sequence[int]) -> float:
    return max(cold_regrets(engine, prompt, ids))


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_swa"])
@pytest.mark.parametrize("wrong", [False, True])
def test_greedy_tokens_are_the_best_ones(
    request: pytest.FixtureRequest, kind: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = request.getfixturevalue(kind)
    config = {"type_k": "f16", "type_v": "f16", "flash_attn": "auto", "n_threads": 1}
    prompt = "the lamp and the river " * 12
    (expected,), _ = answers(path, [prompt], config=config)
    if wrong:
        monkeypatch.setattr("llama_worker._decoding.common_prefix", one_too_many)
    (found,), metrics = answers(path, [prompt], [expected[0]], config=config)
    with LlamaWorker(ModelConfig(model=str(path), n_ctx=1024, n_threads=1)) as worker:
        tokens = worker._view().prompt_tokens(prompt)
    engine = load(ModelConfig(model=str(path), n_ctx=1024, n_threads=1)).engine
    worst = worst_regret(engine, tokens, found[0])
    engine.close()
    assert worst > 0.2 if wrong else worst <= 0.05
    assert metrics.accepted_drafts


@pytest.mark.parametrize("seed", range(40 if PROOF else 4))
def test_random_cancels_leave_the_cache_right(tiny_llama: Path, seed: int) -> None:
    """Whoever comes next, from the slots that were left, says the best tokens."""
    rng = random.Random(seed)
    texts = [f"{'the of and to ' * 20} {WORDS} {i}" for i in range(3)]
    config = {"type_k": "f16", "type_v": "f16", "flash_attn": "auto", "n_threads": 1, "n_ctx": 1024, "n_kv_cells": 1024}
    (expected, *others), _ = answers(tiny_llama, texts, config=config)
    with Run(tiny_llama, speculation="on", **config) as run:
        for _ in range(12):
            which = rng.randrange(3)
            sink, cancel = run.bench.ask(texts[which], max_tokens=N, temperature=0.0, ignore_eos=True)
            run.bench.step()
            for generation in run.bench.scheduler.running:
                reply = (expected, *others)[which][0]
                generation.drafter = Oracle(generation, reply, 0.2, seed=rng.randrange(1000))
            for _ in range(rng.randrange(12)):
                if not sink.is_answered:  # an idle worker waits
                    run.bench.step()
            if rng.random() < 0.3:
                run.probe.abort_next = True
            if rng.random() < 0.7:
                cancel.cancel()
            run.bench.settle(sink)
        last = run.bench.ask(texts[0], max_tokens=20, temperature=0.0, ignore_eos=True)[0]
        run.bench.settle(last)
        ids = run.probe.chosen[id(run.probe.samplers[-1])]
        view = run.bench.published.view(0)
        assert view is not None
        tokens = view.prompt_tokens(texts[0])
    engine = load(ModelConfig(model=str(tiny_llama), n_ctx=1024, n_threads=1)).engine
    assert worst_regret(engine, tokens, ids) <= 0.05
    engine.close()


def test_a_text_that_repeats_is_guessed_by_itself(tiny_llama: Path) -> None:
    """No oracle: the index alone, on a model that came into a circle."""
    config = ModelConfig(model=str(tiny_llama), n_ctx=2048, n_threads=1, speculation="on")
    with LlamaWorker(config) as worker:
        reply = worker.generate("the the the the the the", max_tokens=600, temperature=0.0, ignore_eos=True)
        metrics = worker.metrics()
        assert reply.usage.completion_tokens == 600
        assert metrics.drafted_tokens
        assert worker.generate("hello", max_tokens=20, temperature=0.0, ignore_eos=True, speculate=False).text
        assert worker.metrics().drafted_tokens == metrics.drafted_tokens
