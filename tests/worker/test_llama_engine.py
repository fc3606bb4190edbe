"""LlamaEngine computes what llama.cpp would, and its limits say what it can do."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llama_worker import (
    ConfigError,
    EngineVersionError,
    ModelConfig,
    ModelLoadError,
    SamplingParams,
    UnsupportedFeatureError,
)
from llama_worker._engine import library as native
from llama_worker._engine.base import DecodeStatus, Floats, LoadedModel, Span, TokenIds
from llama_worker._engine.llama import LlamaEngine, load
from llama_worker._engine.log import collected_log, error_lines, forward_log, thread_log
from llama_worker._engine.threads import usable_cores
from llama_worker._engine.vocabulary import LlamaVocabulary
from llama_worker._models import read_info
from tests import synth

pytestmark = pytest.mark.engine

NEVER = float("-inf")


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, np.int32)


def numbers(n: int, first: int = 300) -> TokenIds:
    return (first + np.arange(n, dtype=np.int32) * 7 % 200).astype(np.int32)


def loaded(path: Path, **changes: object) -> LoadedModel:
    settings: dict[str, object] = {"n_ctx": 1024, "n_parallel": 4, "n_threads": 1} | changes
    return load(ModelConfig(model=str(path), **settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Iterator[LoadedModel]:
    model = loaded(tiny_llama)
    yield model
    model.engine.close()


@pytest.fixture
def engine(model: LoadedModel) -> LlamaEngine:
    engine = model.engine
    assert isinstance(engine, LlamaEngine)
    for seq in range(engine.limits.n_seq):
        engine.seq_clear(seq)
    return engine


def prefill(engine: LlamaEngine, tokens: TokenIds, seq: int = 0) -> Floats:
    """The logits after `tokens`, copied."""
    start = engine.seq_end(seq)
    assert engine.decode([Span(seq, start, tokens, True)]) is DecodeStatus.OK
    return engine.logits(len(tokens) - 1).copy()


def fill(engine: LlamaEngine, seq: int, tokens: TokenIds) -> Floats:
    """The logits after `tokens`, decoded 60 at a time."""
    return [prefill(engine, tokens[at : at + 60], seq) for at in range(0, len(tokens), 60)][-1]


def greedy(engine: LlamaEngine, n: int, seq: int, logits: Floats) -> list[int]:
    """The next `n` likeliest tokens, the last of them not decoded."""
    tokens = [int(logits.argmax())]
    while len(tokens) < n:
        tokens.append(int(prefill(engine, ids(tokens[-1]), seq).argmax()))
    return tokens


def close_to(actual: Floats, expected: Floats) -> None:
    """Equal up to rounding: CPU kernels change with the shape of a batch. Wrong rows are about 1 apart."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.03)


# --- limits


def test_limits_are_read_back_from_the_context(tiny_llama: Path):
    engine = loaded(tiny_llama, n_ctx=1000, n_parallel=3, n_batch=128, n_ubatch=64).engine
    limits = engine.limits
    assert (limits.n_ctx, limits.n_batch, limits.n_ubatch, limits.n_seq) == (1024, 128, 64, 3)
    assert (limits.n_vocab, limits.n_embd) == (synth.N_VOCAB, 128)
    assert limits.generates
    assert limits.embeds
    engine.close()


def test_zero_n_ctx_means_the_trained_context(tiny_llama: Path):
    engine = loaded(tiny_llama, n_ctx=0).engine
    assert engine.limits.n_ctx == synth.N_CTX
    engine.close()


def test_all_sequences_share_n_kv_cells(tiny_llama: Path):
    engine = loaded(tiny_llama, n_ctx=256, n_kv_cells=2000).engine
    assert engine.limits.n_ctx == 2048
    engine.close()


@pytest.mark.parametrize(
    ("name", "can_trim", "can_share"),
    [("tiny_llama", True, True), ("tiny_swa", True, True), ("tiny_mamba", False, False), ("tiny_lfm2", False, False)],
)
def test_the_memory_says_what_it_can(request: pytest.FixtureRequest, name: str, can_trim: bool, can_share: bool):
    engine = loaded(request.getfixturevalue(name)).engine
    assert (engine.limits.can_trim, engine.limits.can_share) == (can_trim, can_share)
    assert all(engine.seq_end(seq) == 0 for seq in range(4)), "probing leaves nothing behind"
    engine.close()


def test_an_embedding_model_does_not_generate(tiny_bert: Path):
    engine = loaded(tiny_bert).engine
    assert (engine.limits.generates, engine.limits.embeds, engine.limits.n_embed_text) == (False, True, 512)
    with pytest.raises(UnsupportedFeatureError, match="generation"):
        engine.decode([Span(0, 0, ids(1), True)])
    engine.close()


# --- decoding


def test_a_prompt_in_chunks_computes_the_same(engine: LlamaEngine):
    prompt = numbers(300)
    whole = prefill(engine, prompt, seq=0)
    for at in range(0, 300, 70):
        chunked = prefill(engine, prompt[at : at + 70], seq=1)
    assert engine.seq_end(1) == 300
    close_to(chunked, whole)


def test_sequences_in_one_batch_do_not_see_each_other(engine: LlamaEngine):
    a, b = numbers(40), numbers(60, first=310)
    alone = [prefill(engine, a, 0), prefill(engine, b, 1)]
    spans = [Span(2, 0, a, True), Span(3, 0, b, True)]
    assert engine.decode(spans) is DecodeStatus.OK
    close_to(engine.logits(39), alone[0])
    close_to(engine.logits(99), alone[1])


def test_prefill_and_decode_rows_may_mix(engine: LlamaEngine):
    expected = prefill(engine, numbers(20), 0)
    prefill(engine, numbers(19), 1)
    spans = [Span(1, 19, numbers(20)[19:], True), Span(2, 0, numbers(50), False), Span(3, 0, ids(5), True)]
    assert engine.decode(spans) is DecodeStatus.OK
    close_to(engine.logits(0), expected)
    with pytest.raises(ValueError, match="row=50"):
        engine.logits(50)
    assert engine.logits(51).shape == (synth.N_VOCAB,)


def test_one_sequence_may_continue_within_a_call(engine: LlamaEngine):
    expected = prefill(engine, numbers(30), 0)
    spans = [Span(1, 0, numbers(30)[:10], False), Span(1, 10, numbers(30)[10:], True)]
    assert engine.decode(spans) is DecodeStatus.OK
    close_to(engine.logits(29), expected)


def test_a_trimmed_sequence_continues_as_if_it_had_never_been_longer(engine: LlamaEngine):
    expected = prefill(engine, numbers(50), 0)
    prefill(engine, np.concatenate([numbers(40), numbers(60, first=305)]), 1)
    assert engine.seq_trim(1, 40)
    assert engine.seq_end(1) == 40
    close_to(prefill(engine, numbers(50)[40:], 1), expected)


def test_a_shared_prefix_continues_like_its_own(engine: LlamaEngine):
    expected = prefill(engine, numbers(50), 0)
    engine.seq_share(0, 1, 40)
    engine.seq_clear(0)
    assert (engine.seq_end(0), engine.seq_end(1)) == (0, 40)
    close_to(prefill(engine, numbers(50)[40:], 1), expected)


def test_a_shared_prefix_takes_no_cells(engine: LlamaEngine):
    """1024 cells hold 1000 tokens four times if they are the same."""
    prefill(engine, numbers(1000))
    for target in (1, 2, 3):
        engine.seq_share(0, target, 1000)
    spans = [Span(seq, 1000, ids(5), True) for seq in range(4)]
    assert engine.decode(spans) is DecodeStatus.OK


def test_a_full_cache_leaves_everything_as_it_was(engine: LlamaEngine):
    prefill(engine, numbers(1000))
    assert engine.decode([Span(1, 0, numbers(100), True)]) is DecodeStatus.KV_FULL
    assert (engine.seq_end(0), engine.seq_end(1)) == (1000, 0)
    assert engine.decode([Span(0, 1000, ids(5), True)]) is DecodeStatus.OK
    engine.seq_clear(0)
    assert engine.decode([Span(1, 0, numbers(100), True)]) is DecodeStatus.OK


@pytest.mark.parametrize("name", ["tiny_mamba", "tiny_lfm2"])
def test_a_model_with_a_state_trims_to_nothing_or_not_at_all(request: pytest.FixtureRequest, name: str):
    engine = loaded(request.getfixturevalue(name)).engine
    assert isinstance(engine, LlamaEngine)
    expected = prefill(engine, numbers(20))
    assert not engine.seq_trim(0, 10)
    assert engine.seq_end(0) == 20
    assert engine.seq_trim(0, 20)
    assert engine.seq_trim(0, 0)
    close_to(prefill(engine, numbers(20)), expected)
    engine.close()


def test_a_small_window_trims_only_what_it_still_holds(tiny_swa: Path):
    """With swa_full=False, cells behind the window of 64 are reused: no going back over them."""
    engine = loaded(tiny_swa, swa_full=False, n_batch=64, n_ubatch=64).engine
    assert isinstance(engine, LlamaEngine)
    assert not engine.limits.can_share
    for at in range(0, 600, 60):
        prefill(engine, numbers(600)[at : at + 60])
    assert not engine.seq_trim(0, 100)
    assert engine.seq_end(0) == 600
    assert engine.seq_trim(0, 599)
    expected = prefill(engine, numbers(600)[599:])
    engine.seq_clear(0)
    for at in range(0, 600, 60):
        again = prefill(engine, numbers(600)[at : at + 60])
    close_to(expected, again)
    engine.close()


@pytest.mark.parametrize("swa_full", [False, True])
def test_a_window_takes_one_micro_batch_a_call(tiny_swa: Path, swa_full: bool):
    """Of several, llama.cpp may give up cells that the first one's rows still attend to."""
    engine = loaded(tiny_swa, swa_full=swa_full, n_batch=512, n_ubatch=64).engine
    assert (engine.limits.n_batch, engine.limits.n_ubatch) == (64, 64)
    with pytest.raises(ValueError, match="at most 64 rows"):
        engine.decode([Span(0, 0, numbers(65), True)])
    engine.close()


def test_a_full_window_trims_anywhere(tiny_swa: Path):
    engine = loaded(tiny_swa, swa_full=True).engine
    assert isinstance(engine, LlamaEngine)
    expected = prefill(engine, numbers(200))
    prefill(engine, numbers(300))
    assert engine.seq_trim(0, 100)
    close_to(prefill(engine, numbers(200)[100:]), expected)
    engine.close()


def test_a_full_window_keeps_what_others_could_take(tiny_swa: Path):
    """llama.cpp looks for room behind what was cut off, and there takes the cells that a window has left behind it."""
    engine = loaded(tiny_swa, n_ctx=1024, n_batch=64, n_ubatch=64).engine
    assert isinstance(engine, LlamaEngine)
    long = numbers(240)
    expected = fill(engine, 1, long[:120])
    engine.seq_clear(1)
    fill(engine, 0, long)
    fill(engine, 1, long)
    assert engine.seq_trim(0, 120)
    fill(engine, 0, numbers(240))
    engine.seq_share(1, 2, 100)
    close_to(prefill(engine, long[100:120], 2), expected)
    assert engine.seq_trim(1, 100)
    close_to(prefill(engine, long[100:120], 1), expected)
    engine.close()


def test_a_full_window_keeps_what_it_decoded_since_it_was_restored(tiny_swa: Path):
    engine = loaded(tiny_swa, n_ctx=1024, n_batch=64, n_ubatch=64).engine
    assert isinstance(engine, LlamaEngine)
    long = numbers(240)
    expected = fill(engine, 1, long)
    assert engine.seq_trim(1, 120)
    state = engine.seq_save(1)
    engine.seq_clear(1)
    fill(engine, 0, long)
    engine.seq_restore(1, state, 120)
    fill(engine, 1, np.append(long[120:], long[:60]))
    assert engine.seq_trim(0, 120)
    fill(engine, 0, numbers(240))
    assert engine.seq_trim(1, 121)
    close_to(fill(engine, 1, long[121:]), expected)
    engine.close()


def test_real_text_comes_out_of_the_demo_model(smollm2_path: Path):
    model = loaded(smollm2_path)
    engine = model.engine
    assert isinstance(engine, LlamaEngine)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    tokens = model.vocabulary.tokenize(prompt, add_special=False, parse_special=True)
    reply = greedy(engine, 8, 0, prefill(engine, tokens))
    assert b"Paris" in b"".join(model.vocabulary.pieces[token] for token in reply)
    engine.close()


# --- sampling


def draws(engine: LlamaEngine, row: int, n: int, **params: object) -> list[int]:
    sampler = engine.new_sampler(SamplingParams(**params), ids())  # type: ignore[arg-type]
    tokens = [engine.sample(row, sampler) for _ in range(n)]
    sampler.close()
    return tokens


def test_greedy_takes_the_likeliest(engine: LlamaEngine):
    best = int(prefill(engine, numbers(20)).argmax())
    for params in ({"temperature": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}, {"temperature": 1e-6}):
        assert draws(engine, 19, 3, **params) == [best] * 3, params


def test_a_seed_makes_draws_repeatable(engine: LlamaEngine):
    prefill(engine, numbers(20))
    hot = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert draws(engine, 19, 20, seed=1, **hot) == draws(engine, 19, 20, seed=1, **hot)
    assert draws(engine, 19, 20, seed=1, **hot) != draws(engine, 19, 20, seed=2, **hot)
    assert draws(engine, 19, 20, **hot) != draws(engine, 19, 20, **hot), "without a seed one is drawn"


def test_draws_follow_the_softmax(engine: LlamaEngine):
    """At temperature 1 with nothing truncated, frequencies are the model's probabilities."""
    logits = prefill(engine, numbers(20)).astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    n = 4000
    counts = Counter(draws(engine, 19, n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7))
    for token in np.argsort(shares)[-5:]:
        deviation = np.sqrt(shares[token] * (1 - shares[token]) / n)
        assert abs(counts[int(token)] / n - shares[token]) < 5 * deviation


def test_bias_and_ban_move_the_choice(engine: LlamaEngine):
    order = np.argsort(prefill(engine, numbers(20)))[::-1]
    first, second, last = int(order[0]), int(order[1]), int(order[-1])
    assert draws(engine, 19, 1, temperature=0.0, logit_bias={first: NEVER}) == [second]
    assert draws(engine, 19, 1, temperature=0.0, logit_bias={last: 100.0}) == [last]
    assert draws(engine, 19, 1, temperature=0.0, logit_bias={first: -1e9, second: -1e30}) == [int(order[2])]


def test_ignore_eos_bans_every_end_token(engine: LlamaEngine, model: LoadedModel):
    prefill(engine, numbers(20))
    (end,) = model.vocabulary.end_tokens & {synth.IM_END}
    assert draws(engine, 19, 1, temperature=0.0, logit_bias={end: 100.0}) == [end]
    assert draws(engine, 19, 1, temperature=0.0, logit_bias={end: 100.0}, ignore_eos=True) != [end]


def test_penalties_see_the_history(engine: LlamaEngine):
    best = int(prefill(engine, numbers(20)).argmax())
    params = SamplingParams(temperature=0.0, presence_penalty=100.0, repeat_last_n=8)
    recent, forgotten = ids(best, *[1] * 7), ids(best, *[1] * 8)
    assert engine.sample(19, engine.new_sampler(params, ids())) == best
    assert engine.sample(19, engine.new_sampler(params, recent)) != best
    assert engine.sample(19, engine.new_sampler(params, forgotten)) == best


def test_a_penalty_over_everything_reaches_back_to_the_first_token(engine: LlamaEngine):
    best = int(prefill(engine, numbers(20)).argmax())
    params = SamplingParams(temperature=0.0, presence_penalty=100.0, repeat_last_n=-1)
    assert engine.sample(19, engine.new_sampler(params, ids(best, *[1] * 900))) != best


def test_dry_breaks_a_repetition(engine: LlamaEngine):
    best = int(prefill(engine, numbers(20)).argmax())
    loop = ids(*[301, 302, 303, 304, best] * 3, 301, 302, 303, 304)
    assert engine.sample(19, engine.new_sampler(SamplingParams(temperature=0.0, dry_multiplier=0.0), loop)) == best
    assert engine.sample(19, engine.new_sampler(SamplingParams(temperature=0.0, dry_multiplier=50.0), loop)) != best


@pytest.mark.parametrize("mirostat", [1, 2])
def test_mirostat_with_a_low_target_is_almost_greedy(engine: LlamaEngine, mirostat: int):
    best = int(prefill(engine, numbers(20)).argmax())
    assert set(draws(engine, 19, 10, mirostat=mirostat, mirostat_tau=0.0, seed=3)) == {best}


def test_sampling_leaves_the_logits_alone(engine: LlamaEngine):
    before = prefill(engine, numbers(20))
    draws(engine, 19, 3, repeat_penalty=2.0, logit_bias={5: 7.0})
    np.testing.assert_array_equal(engine.logits(19), before)


def test_a_dropped_sampler_frees_itself(engine: LlamaEngine):
    sampler = engine.new_sampler(SamplingParams(), ids())
    freed = weakref.ref(sampler)
    del sampler
    gc.collect()
    assert freed() is None


# --- embedding


def test_texts_embed_alike_alone_and_together(tiny_bert: Path):
    engine = loaded(tiny_bert).engine
    texts = [numbers(n, first=100) for n in (3, 50, 1, 200)]
    together = engine.embed(texts)
    alone = np.concatenate([engine.embed([text]) for text in texts])
    assert together.shape == (4, 64)
    np.testing.assert_allclose(together, alone, rtol=0, atol=5e-3)
    assert engine.embed([]).shape == (0, 64)
    engine.close()


def test_a_text_longer_than_the_position_table_is_refused(tiny_bert: Path):
    """Its position embeddings end there: llama.cpp would read beyond them."""
    engine = loaded(tiny_bert).engine
    assert engine.embed([numbers(512, first=100)]).shape == (1, 64)
    with pytest.raises(ValueError, match="512"):
        engine.embed([numbers(513, first=100)])
    engine.close()


def test_a_generating_model_embeds_without_disturbing_its_sequences(engine: LlamaEngine):
    expected = prefill(engine, numbers(30), 0)
    prefill(engine, numbers(29), 1)
    texts = [numbers(10), numbers(400, first=310)]
    vectors = engine.embed(texts)
    np.testing.assert_allclose(vectors[1], engine.embed([texts[1]])[0], rtol=0, atol=5e-3)
    close_to(prefill(engine, numbers(30)[29:], 1), expected)


@pytest.mark.parametrize("name", ["tiny_swa", "tiny_mamba", "tiny_lfm2"])
def test_every_kind_of_memory_embeds(request: pytest.FixtureRequest, name: str):
    engine = loaded(request.getfixturevalue(name)).engine
    texts = [numbers(n) for n in (5, 100, 33)]
    first, again = engine.embed(texts), engine.embed(texts)
    assert np.isfinite(first).all()
    np.testing.assert_allclose(first, again, rtol=0, atol=5e-3)
    engine.close()


def test_pooling_decides_the_vector(tiny_bert: Path):
    text = numbers(20, first=100)
    vectors = {}
    for pooling in ("model", "mean", "cls", "last"):
        engine = loaded(tiny_bert, pooling=pooling).engine
        vectors[pooling] = engine.embed([text])[0]
        engine.close()
    np.testing.assert_allclose(vectors["model"], vectors["mean"], rtol=0, atol=5e-3)
    assert np.abs(vectors["cls"] - vectors["mean"]).max() > 0.01
    assert np.abs(vectors["last"] - vectors["mean"]).max() > 0.01


def test_similar_sentences_lie_close(minilm_path: Path):
    model = loaded(minilm_path)
    texts = ["The cat sits on the mat", "A kitten is resting on a rug", "Quarterly revenue rose by four percent"]
    rows = [model.vocabulary.tokenize(text, add_special=True, parse_special=False) for text in texts]
    vectors = model.engine.embed(rows)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert vectors[0] @ vectors[1] > 0.5
    assert vectors[0] @ vectors[2] < 0.2
    model.engine.close()


# --- vocabulary


def test_tokens_come_back_as_their_text(model: LoadedModel):
    vocabulary = model.vocabulary
    for text in ("hello world", "", "two\nlines\n\n", "äöü 你好 😀", "a\0b", "   spaces   "):
        tokens = vocabulary.tokenize(text, add_special=False, parse_special=False)
        assert b"".join(vocabulary.pieces[token] for token in tokens) == text.encode()


def test_special_tokens_are_the_callers_choice(model: LoadedModel):
    vocabulary = model.vocabulary
    text = "<|im_start|>hello<|im_end|>"
    parsed = vocabulary.tokenize(text, add_special=False, parse_special=True).tolist()
    assert (parsed[0], parsed[-1]) == (synth.IM_START, synth.IM_END)
    plain = vocabulary.tokenize(text, add_special=False, parse_special=False).tolist()
    assert not {synth.IM_START, synth.IM_END} & set(plain)
    assert vocabulary.tokenize("hello", add_special=True, parse_special=False)[0] == synth.BOS


def test_the_vocabulary_knows_its_special_texts(model: LoadedModel):
    vocabulary = model.vocabulary
    assert synth.IM_END in vocabulary.end_tokens
    assert {"<|im_start|>", "<|im_end|>", "<s>", "</s>"} <= set(vocabulary.control_texts)
    assert list(vocabulary.control_texts) == sorted(vocabulary.control_texts, key=lambda t: (-len(t), t))
    assert (vocabulary.bos_text, vocabulary.eos_text) == ("<s>", "<|im_end|>")
    assert len(vocabulary.pieces) == vocabulary.n_tokens == synth.N_VOCAB


def test_the_vocabulary_outlives_the_engine_and_serves_all_threads(tiny_llama: Path):
    model = loaded(tiny_llama)
    vocabulary = model.vocabulary
    model.engine.close()
    text = "hello world agent tool " * 300
    expected = vocabulary.tokenize(text, add_special=True, parse_special=True).tolist()
    results: list[list[int]] = []

    def tokenize() -> None:
        results.extend(vocabulary.tokenize(text, add_special=True, parse_special=True).tolist() for _ in range(5))

    threads = [threading.Thread(target=tokenize) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 40


# --- loading


def test_a_dropped_engine_gives_its_memory_back(tiny_llama: Path):
    model = loaded(tiny_llama)
    engine = model.engine
    assert isinstance(engine, LlamaEngine)
    sampler = engine.new_sampler(SamplingParams(), ids())
    freed = weakref.ref(engine)
    del model, engine
    gc.collect()
    assert freed() is None
    assert sampler.closed


def test_a_context_that_cannot_be_is_a_load_error_with_the_reason(tiny_llama: Path):
    """A quantised V cache needs flash attention; llama.cpp says so in its log. `load` says it first."""
    config = ModelConfig(model=str(tiny_llama), n_threads=1, type_v="q8_0", flash_attn="off")
    with pytest.raises(ModelLoadError, match=r"(?i)flash"):
        LlamaEngine(config, tiny_llama, read_info(tiny_llama))
    with pytest.raises(ConfigError, match="flash attention") as refused:
        loaded(tiny_llama, type_v="q8_0", flash_attn="off")
    assert refused.value.field == "type_v"


def test_more_tensor_shares_than_devices_are_refused(tiny_llama: Path):
    with pytest.raises(ConfigError, match="tensor_split"):
        loaded(tiny_llama, tensor_split=(1.0,) * 1000)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0"])
def test_kv_types_are_passed_on(tiny_llama: Path, kv_type: str):
    engine = loaded(tiny_llama, type_k=kv_type, type_v=kv_type, flash_attn="on").engine
    assert isinstance(engine, LlamaEngine)
    assert np.isfinite(prefill(engine, numbers(20))).all()
    engine.close()


@pytest.mark.parametrize("load_mode", ["auto", "none", "mmap"])
def test_load_modes_are_passed_on(tiny_llama: Path, load_mode: str):
    engine = loaded(tiny_llama, load_mode=load_mode, split_mode="none", tensor_split=(1.0,)).engine
    assert isinstance(engine, LlamaEngine)
    assert np.isfinite(prefill(engine, numbers(20))).all()
    engine.close()


def test_cores_are_capped_by_the_containers_quota(tmp_path: Path):
    unlimited, quota = tmp_path / "max", tmp_path / "quota"
    unlimited.write_text("max 100000\n")
    quota.write_text("100000 100000\n")
    assert usable_cores(quota) == 1
    assert usable_cores(unlimited) == usable_cores(tmp_path / "missing") >= 1


# --- the binding


@pytest.mark.parametrize("version", ["0.3.35", "0.3.9", "0.4.0", "1.0", "0.2.90"])
def test_other_versions_of_the_binding_are_refused(version: str):
    with pytest.raises(EngineVersionError, match="not supported"):
        native._check_version(version)


@pytest.mark.parametrize("version", ["0.3.36", "0.3.37", "0.3.36+cu124", "0.3.100"])
def test_known_versions_of_the_binding_are_accepted(version: str):
    native._check_version(version)


def test_changed_defaults_are_named():
    """A field that moved shows as a wrong value, one that is gone as missing."""
    params = native.library().api.llama_context_default_params()
    native._check_defaults("params", params, native._CONTEXT_DEFAULTS)
    params.n_batch = 7
    with pytest.raises(EngineVersionError, match=r"n_batch is 7 \(expected 2048\)"):
        native._check_defaults("params", params, native._CONTEXT_DEFAULTS)
    with pytest.raises(EngineVersionError, match="gone is missing"):
        native._check_defaults("params", params, {"gone": 1})


def test_changed_fields_are_refused():
    batch = native.library().api.llama_batch
    native._check_fields(batch, native._BATCH_FIELDS)
    with pytest.raises(EngineVersionError, match="llama_batch"):
        native._check_fields(batch, native._BATCH_FIELDS[1:])


def test_long_calls_are_not_bound_to_the_gil():
    short = native.library().short
    for name in ("llama_decode", "llama_encode", "llama_synchronize", "llama_model_load_from_file"):
        with pytest.raises(AttributeError):
            getattr(short, name)


# --- the log


def test_native_lines_reach_logging_whole(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "llama_worker.llama_cpp"):
        forward_log(2, b"loading ", None)
        forward_log(5, b"tensors\n", None)
        forward_log(4, b"it broke \xff\n", None)
        forward_log(5, b".", None)
        forward_log(5, b"..\n", None)
        forward_log(3, None, None)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "loading tensors"),
        ("ERROR", "it broke \ufffd"),
    ]


def test_an_expected_outcome_is_logged_for_debugging_only(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "llama_worker.llama_cpp"):
        for expected in (True, False):
            thread_log().hold()
            forward_log(4, b"failed to decode\n", None)
            thread_log().release(expected=expected)
    assert [r.levelname for r in caplog.records] == ["DEBUG", "ERROR"]


def test_errors_are_collected_for_the_message(caplog: pytest.LogCaptureFixture):
    with collected_log() as lines:
        forward_log(2, b"hello\n", None)
        forward_log(4, b"first\n", None)
        forward_log(4, b"second\n", None)
    assert error_lines(lines) == "first; second"
    with collected_log() as nothing:
        pass
    assert error_lines(nothing) == "llama.cpp gave no reason"


def test_nothing_is_printed(tiny_llama: Path, capfd: pytest.CaptureFixture[str]):
    """Neither Python nor C writes to the terminal, also when a decode is aborted."""
    engine = loaded(tiny_llama).engine
    engine.abort_flag.raise_()
    assert engine.decode([Span(0, 0, numbers(20), True)]) is DecodeStatus.ABORTED
    engine.close()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# --- cost


def test_python_takes_little_time_for_each_token(tiny_llama: Path):
    """Eight rows: checks, batch and bookkeeping of a step, without llama.cpp, per token."""
    engine = loaded(tiny_llama, n_parallel=8).engine
    assert isinstance(engine, LlamaEngine)
    generator = engine._generator
    assert generator is not None
    steps = 500
    started = time.thread_time()
    for _ in range(steps):
        spans = [Span(seq, 0, ids(300), True) for seq in range(8)]
        generator._checked(spans)
        generator._batch.fill(spans)
        thread_log().hold()
        thread_log().release(expected=True)
    per_token = (time.thread_time() - started) / steps / 8 * 1e6
    print(f"python per token and step: {per_token:.1f} us")
    assert per_token < 30
    engine.close()


def test_a_text_in_two_pieces_has_the_ids_of_the_whole(synth_folder: Path):
    """SentencePiece puts a space before each text that it is given: not before one that continues another."""
    vocabulary = LlamaVocabulary(synth.llama(synth_folder / "spaced.gguf", space_prefix=True))

    def ids(text: str, after: int | None = None) -> list[int]:
        return vocabulary.tokenize(text, add_special=False, parse_special=True, after=after).tolist()

    first = ids("hello")
    assert first + ids(", world", first[-1]) == ids("hello, world")
    control = ids("<|im_end|>")
    assert control + ids("hello", control[-1]) == ids("<|im_end|>hello")
    assert first + ids(", world") != ids("hello, world")
