"""A mask leaves some tokens: none of the others comes out, whatever the chain, and nothing ends the process."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llama_worker import GenerationError, ModelConfig, SamplingParams
from llama_worker._engine import masking
from llama_worker._engine.base import DecodeStatus, Engine, Mask, Sampler, Span
from llama_worker._engine.llama import LlamaEngine, load
from llama_worker.testing import FakeEngine, fake_limits
from llama_worker.testing._tokenizer import IM_END

pytestmark = pytest.mark.engine

ROUNDS = 2000 if os.environ.get("LLAMA_WORKER_PROOF") else 200
NOTHING = np.empty(0, np.int32)
ROW = 3


def mask_of(tokens: Iterable[int], n_vocab: int) -> Mask:
    bits = np.zeros(n_vocab, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little")


def sampler_of(engine: Engine, **params: object) -> Sampler:
    return engine.new_sampler(SamplingParams(**params), NOTHING)  # type: ignore[arg-type]


def decoded(engine: Engine) -> Engine:
    engine.seq_clear(0)
    prompt = np.array([70, 71, 72, 73], np.int32)
    assert engine.decode([Span(0, 0, prompt, True)]) is DecodeStatus.OK
    return engine


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Iterator[LlamaEngine]:
    engine = load(ModelConfig(model=str(tiny_llama), n_ctx=256, n_parallel=1, n_threads=1)).engine
    assert isinstance(engine, LlamaEngine)
    yield engine
    engine.close()


@pytest.fixture(params=["few", "many"])
def real(request: pytest.FixtureRequest, llama: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> LlamaEngine:
    """The real engine, in both of its ways: candidates of their own, and a row that is masked in place."""
    monkeypatch.setattr(masking, "_FEW", 256 if request.param == "few" else -1)
    decoded(llama)
    return llama


@pytest.fixture(params=["fake", "scripted", "few", "many"])
def engine(request: pytest.FixtureRequest, llama: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    if request.param in ("fake", "scripted"):
        replies = ("some text " * 9,) if request.param == "scripted" else ()
        return decoded(FakeEngine(fake_limits(ModelConfig(model="fake://m")), replies=replies))
    monkeypatch.setattr(masking, "_FEW", 256 if request.param == "few" else -1)
    return decoded(llama)


# --- both engines


def test_only_what_the_mask_leaves_comes_out(engine: Engine) -> None:
    rng, n = random.Random(7), engine.limits.n_vocab
    for _ in range(ROUNDS // 4):
        allowed = set(rng.sample(range(n), rng.choice([1, 2, 7, 40, n // 2, n - 1])))
        sampler = sampler_of(engine, temperature=rng.choice([0.0, 0.7, 50.0]), top_k=rng.choice([0, 1, 40]))
        assert engine.sample(ROW, sampler, mask_of(allowed, n)) in allowed
        sampler.close()
        decoded(engine)


def test_a_mask_that_leaves_nothing_is_an_error_and_the_engine_works_on(engine: Engine) -> None:
    n = engine.limits.n_vocab
    for params in ({"temperature": 0.0}, {}):
        sampler = sampler_of(engine, **params)
        with pytest.raises(GenerationError, match="no token was left"):
            engine.sample(ROW, sampler, mask_of([], n))
        assert engine.sample(ROW, sampler, mask_of([65], n)) == 65


def test_what_the_mask_leaves_may_be_banned(engine: Engine) -> None:
    n, end = engine.limits.n_vocab, IM_END if isinstance(engine, FakeEngine) else 4
    for temperature in (0.0, 1.0):
        sampler = sampler_of(engine, temperature=temperature, ignore_eos=True)
        with pytest.raises(GenerationError, match="no token was left"):
            engine.sample(ROW, sampler, mask_of([end], n))
        assert engine.sample(ROW, sampler, mask_of([end, 66], n)) == 66


@pytest.mark.parametrize("shape", ["short", "long", "two rows", "bools"])
def test_a_mask_of_another_vocabulary_is_refused(engine: Engine, shape: str) -> None:
    mask = mask_of([65], engine.limits.n_vocab)
    bad = {
        "short": mask[:-1],
        "long": np.append(mask, np.uint8(0)),
        "two rows": mask.reshape(1, -1),
        "bools": mask.astype(bool),
    }[shape]
    with pytest.raises(ValueError, match="mask"):
        engine.sample(ROW, sampler_of(engine), bad)


def test_bits_behind_the_last_token_count_for_nothing() -> None:
    engine = decoded(FakeEngine(fake_limits(ModelConfig(model="fake://m"))))  # 259 tokens in 33 bytes
    mask = mask_of([], engine.limits.n_vocab)
    mask[-1] = 0b1111_1000
    with pytest.raises(GenerationError, match="no token was left"):
        engine.sample(ROW, sampler_of(engine), mask)


def test_bits_behind_the_last_token_count_for_nothing_in_llama_cpp_either(llama: LlamaEngine) -> None:
    masks = masking.Masks(llama._require_generator()._lib, 259)
    mask = mask_of([], 259)
    mask[-1] = 0b1111_1100
    tokens = masks.narrow(mask, None)
    assert tokens is not None
    assert tokens.tolist() == [258]


# --- the real engine


def test_greedy_takes_the_likeliest_of_what_is_left(real: LlamaEngine) -> None:
    n, rng = real.limits.n_vocab, np.random.default_rng(3)
    for size in (1, 3, 100, n - 3):
        logits = decoded(real).logits(ROW).copy()
        allowed = rng.choice(n, size, replace=False)
        best = int(allowed[logits[allowed].argmax()])
        assert real.sample(ROW, sampler_of(real, temperature=0.0), mask_of(allowed, n)) == best


def test_draws_follow_the_softmax_of_what_is_left(real: LlamaEngine) -> None:
    n, allowed = real.limits.n_vocab, [70, 100, 300, 301]
    logits = real.logits(ROW).copy()
    sampler = sampler_of(real, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)
    drawn: Counter[int] = Counter()
    for _ in range(4000):
        real.logits(ROW)[:] = logits
        drawn[real.sample(ROW, sampler, mask_of(allowed, n))] += 1
    odds = np.exp(logits[allowed] / 2)
    expected = 4000 * odds / odds.sum()
    assert all(abs(drawn[t] - e) < 6 * e**0.5 + 3 for t, e in zip(allowed, expected, strict=True)), (drawn, expected)


def test_typical_sampling_weighs_only_what_is_left(real: LlamaEngine) -> None:
    """A token of probability zero would make its entropy no number, and then it would cut off at the likeliest."""
    n, allowed = real.limits.n_vocab, [60, 61, 62, 63]
    shaped = np.full(n, 20.0, np.float32)
    shaped[allowed] = np.log([0.6, 0.14, 0.13, 0.13])
    drawn = set()
    for seed in range(60):
        real.logits(ROW)[:] = shaped
        sampler = sampler_of(real, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=0.2, seed=seed)
        drawn.add(real.sample(ROW, sampler, mask_of(allowed, n)))
        sampler.close()
    # Entropy 1.11: log 1/0.6 = 0.51 lies 0.60 away, log 1/0.14 = 1.97 lies 0.86 away, and 0.6 is enough.
    assert drawn == {60}


def test_penalties_see_accepted_tokens_and_reach_under_the_mask(real: LlamaEngine) -> None:
    n = real.limits.n_vocab
    shaped = np.zeros(n, np.float32)
    shaped[[60, 61]] = 5.0, 4.9
    sampler = sampler_of(real, temperature=0.0, frequency_penalty=1.0)
    real.logits(ROW)[:] = shaped
    assert real.sample(ROW, sampler_of(real, temperature=0.0, frequency_penalty=1.0), mask_of([60, 61], n)) == 60
    sampler.accept(60)
    real.logits(ROW)[:] = shaped
    assert real.sample(ROW, sampler, mask_of([60, 61], n)) == 61


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_left_must_be_a_number(real: LlamaEngine, value: float, temperature: float) -> None:
    n = real.limits.n_vocab
    real.logits(ROW)[66] = value
    with pytest.raises(GenerationError, match="finite"):
        real.sample(ROW, sampler_of(real, temperature=temperature), mask_of([65, 66, 67], n))
    assert decoded(real).sample(ROW, sampler_of(real), mask_of([65], n)) == 65


def test_a_row_of_minus_infinities_is_an_error(real: LlamaEngine) -> None:
    real.logits(ROW)[:] = -np.inf
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError):
            real.sample(ROW, sampler_of(real, temperature=temperature), mask_of([65, 66], real.limits.n_vocab))


def test_without_a_mask_the_row_is_left_alone(real: LlamaEngine) -> None:
    before = real.logits(ROW).copy()
    real.sample(ROW, sampler_of(real))
    np.testing.assert_array_equal(real.logits(ROW), before)


def test_a_closed_or_strange_sampler_is_refused_under_a_mask_too(real: LlamaEngine) -> None:
    sampler = sampler_of(real)
    sampler.close()
    sampler.accept(65)  # does nothing
    with pytest.raises(ValueError, match="sampler"):
        real.sample(ROW, sampler, mask_of([65], real.limits.n_vocab))


def test_no_combination_of_parameters_and_masks_ends_the_process(real: LlamaEngine) -> None:
    """llama.cpp asserts that a chain selects something; a reply may fail, its process not."""
    rng, n = random.Random(11), real.limits.n_vocab
    outcomes: Counter[str] = Counter()
    for _ in range(ROUNDS):
        sampler = real.new_sampler(_any_params(rng), np.array(rng.choices(range(n), k=9), np.int32))
        allowed = set(rng.sample(range(n), rng.choice([0, 1, 2, 5, 30, 200, n])))
        for _ in range(3):
            try:
                token = real.sample(ROW, sampler, mask_of(allowed, n))
            except GenerationError:
                outcomes["failed"] += 1
                break
            assert token in allowed
            outcomes["chosen"] += 1
            decoded(real)
        sampler.close()
        decoded(real)
    assert outcomes["chosen"] > ROUNDS
    assert outcomes["failed"] > 0


def _any_params(rng: random.Random) -> SamplingParams:
    def one(*values: float) -> float:
        return rng.choice(values)

    bias = {rng.randrange(512): one(-100, 100, float("-inf")) for _ in range(rng.choice([0, 0, 3, 300]))}
    return SamplingParams(
        temperature=one(0.0, 0.1, 1.5, 100),
        top_k=int(one(0, 1, 40, 100000)),
        top_p=one(0, 0.5, 1),
        min_p=one(0, 0.1, 1),
        typical_p=one(0, 0.5, 1, 1),
        top_n_sigma=one(-1, -1, 1.0),
        xtc_probability=one(0, 1),
        xtc_threshold=one(0, 0.1),
        dynatemp_range=one(0, 1),
        repeat_penalty=one(1, 0.01, 100),
        frequency_penalty=one(0, -100, 100),
        dry_multiplier=one(0, 0, 100),
        mirostat=rng.choice([0, 0, 1, 2]),
        logit_bias=tuple(bias.items()),
        ignore_eos=rng.random() < 0.3,
        seed=rng.randrange(1000),
    )
