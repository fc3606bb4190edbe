"""What would make llama.cpp abort the process is refused in Python, and the engine works on afterwards."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from llama_worker import GenerationError, InvalidRequestError, ModelConfig, ModelLoadError, SamplingParams
from llama_worker._engine.base import MOST_DRAFTS, DecodeStatus, Span, TokenIds
from llama_worker._engine.llama import LlamaEngine, load
from llama_worker._engine.vocabulary import LlamaVocabulary
from tests.worker.waiting import in_thread, wait_until

pytestmark = pytest.mark.engine


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, np.int32)


def numbers(n: int, first: int = 300) -> TokenIds:
    return (first + np.arange(n, dtype=np.int32) % 200).astype(np.int32)


def opened(path: Path, **changes: object) -> LlamaEngine:
    settings: dict[str, object] = {"n_ctx": 1024, "n_parallel": 4, "n_batch": 512, "n_threads": 1} | changes
    engine = load(ModelConfig(model=str(path), **settings)).engine  # type: ignore[arg-type]
    assert isinstance(engine, LlamaEngine)
    return engine


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[LlamaEngine]:
    engine = opened(tiny_llama)
    assert engine.decode([Span(0, 0, numbers(8), True)]) is DecodeStatus.OK
    yield engine
    engine.close()


REFUSED_SPANS: dict[str, list[Span]] = {
    "more rows than n_batch": [Span(1, 0, numbers(513), True)],
    "more rows than n_batch in several spans": [Span(s, 0, numbers(200), False) for s in (1, 2, 3)],
    "sequence beyond n_seq": [Span(4, 0, ids(1), True)],
    "sequence beyond llama.cpp's 256": [Span(300, 0, ids(1), True)],
    "negative sequence": [Span(-1, 0, ids(1), True)],
    "token beyond the vocabulary": [Span(1, 0, ids(512), True)],
    "token beyond the vocabulary among others": [Span(1, 0, ids(1, 2, 10**7, 3), True)],
    "negative token": [Span(1, 0, ids(-1), True)],
    "gap": [Span(0, 9, ids(1), True)],
    "overlap": [Span(0, 7, ids(1), True)],
    "start of an empty sequence": [Span(1, 1, ids(1), True)],
    "one sequence twice at one position": [Span(1, 0, ids(1), True), Span(1, 0, ids(2), True)],
    "more outputs than sequences and drafts": [Span(1, i, ids(1), True) for i in range(4 + MOST_DRAFTS + 1)],
    "more outputs than rows": [Span(1, 0, ids(1, 2), 3)],
    "fewer outputs than none": [Span(1, 0, ids(1, 2), -1)],
    "no rows": [Span(1, 0, ids(), True)],
    "no spans": [],
}


@pytest.mark.parametrize("spans", REFUSED_SPANS.values(), ids=REFUSED_SPANS.keys())
def test_bad_rows_are_refused_and_change_nothing(engine: LlamaEngine, spans: list[Span]):
    """Also the logits of the decode before them are still there."""
    before = engine.logits(7).copy()
    with pytest.raises(ValueError):
        engine.decode(spans)
    assert [engine.seq_end(seq) for seq in range(4)] == [8, 0, 0, 0]
    np.testing.assert_array_equal(engine.logits(7), before)
    assert engine.decode([Span(0, 8, ids(1), True), Span(1, 0, numbers(500), False)]) is DecodeStatus.OK


REFUSED_CALLS: dict[str, Callable[[LlamaEngine], object]] = {
    "sample a row without logits": lambda e: e.sample(3, e.new_sampler(SamplingParams(), ids())),
    "sample a row beyond the batch": lambda e: e.sample(8, e.new_sampler(SamplingParams(), ids())),
    "sample a negative row": lambda e: e.sample(-1, e.new_sampler(SamplingParams(), ids())),
    "logits of a row without": lambda e: e.logits(0),
    "end of a sequence out of range": lambda e: e.seq_end(4),
    "clear a sequence out of range": lambda e: e.seq_clear(256),
    "clear every sequence": lambda e: e.seq_clear(-1),
    "trim a sequence out of range": lambda e: e.seq_trim(300, 0),
    "trim to more than there is": lambda e: e.seq_trim(0, 9),
    "trim to less than nothing": lambda e: e.seq_trim(0, -1),
    "share with itself": lambda e: e.seq_share(0, 0, 4),
    "share more than there is": lambda e: e.seq_share(0, 1, 9),
    "share nothing": lambda e: e.seq_share(0, 1, 0),
    "share from out of range": lambda e: e.seq_share(4, 1, 4),
    "share to out of range": lambda e: e.seq_share(0, -2, 4),
    "save a sequence out of range": lambda e: e.seq_save(4),
    "save an empty sequence": lambda e: e.seq_save(1),
    "save a part where there is none": lambda e: e.seq_save(0, partial=True),
    "restore to out of range": lambda e: e.seq_restore(-1, e.seq_save(0), 8),
    "restore from out of range": lambda e: e.seq_restore(1, e.seq_save(0), 8, donor=4),
    "restore over a donor into a sequence in use": lambda e: e.seq_restore(0, e.seq_save(0), 8, donor=1),
    "embed an empty text": lambda e: e.embed([ids()]),
    "embed a token out of range": lambda e: e.embed([ids(512)]),
    "embed too many tokens": lambda e: e.embed([numbers(e.limits.n_embed_tokens)] * 2),
    "embed too many texts": lambda e: e.embed([ids(1)] * (e.limits.n_embed_seq + 1)),
}


@pytest.mark.parametrize("call", REFUSED_CALLS.values(), ids=REFUSED_CALLS.keys())
def test_bad_calls_are_refused(engine: LlamaEngine, call: Callable[[LlamaEngine], object]):
    with pytest.raises(ValueError):
        call(engine)
    assert engine.seq_end(0) == 8


def test_sharing_into_a_sequence_in_use_is_refused(engine: LlamaEngine):
    engine.seq_share(0, 1, 4)
    with pytest.raises(ValueError, match="empty"):
        engine.seq_share(0, 1, 4)


@pytest.mark.parametrize("model", ["tiny_mamba", "tiny_lfm2"])
def test_a_model_with_a_state_shares_no_prefix(request: pytest.FixtureRequest, model: str):
    """A partial copy would abort or leave attention and state at different positions."""
    engine = opened(request.getfixturevalue(model))
    assert not engine.limits.can_share
    engine.decode([Span(0, 0, numbers(8), True)])
    with pytest.raises(ValueError, match="can_share"):
        engine.seq_share(0, 1, 4)
    engine.close()


def test_a_closed_sampler_is_refused(engine: LlamaEngine):
    sampler = engine.new_sampler(SamplingParams(), ids())
    sampler.close()
    with pytest.raises(ValueError, match="sampler"):
        engine.sample(7, sampler)


def test_another_engines_sampler_is_refused(engine: LlamaEngine, tiny_llama: Path):
    other = opened(tiny_llama)
    with pytest.raises(ValueError, match="sampler"):
        engine.sample(7, other.new_sampler(SamplingParams(), ids()))
    other.close()


def test_nothing_is_sampled_from_a_failed_decode(engine: LlamaEngine):
    """The KV cache is full: the logits of the decode before are gone with it."""
    statuses = [engine.decode([Span(1, at, numbers(500), True)]) for at in (0, 500)]
    assert statuses == [DecodeStatus.OK, DecodeStatus.OK]
    assert engine.decode([Span(2, 0, numbers(100), True)]) is DecodeStatus.KV_FULL
    assert [engine.seq_end(seq) for seq in range(3)] == [8, 1000, 0]
    sampler = engine.new_sampler(SamplingParams(), ids())
    for row in (99, 499):
        with pytest.raises(ValueError, match="logits"):
            engine.sample(row, sampler)


def test_nothing_is_sampled_from_an_aborted_decode(engine: LlamaEngine):
    sampler = engine.new_sampler(SamplingParams(temperature=0.0), ids())
    engine.abort_flag.raise_()
    assert engine.decode([Span(0, 8, numbers(100), True)]) is DecodeStatus.ABORTED
    with pytest.raises(ValueError, match="logits"):
        engine.sample(99, sampler)
    engine.abort_flag.clear()
    end = engine.seq_end(0)
    assert end == 8, "one micro-batch: none of its rows may stay"
    assert engine.decode([Span(0, end, numbers(100), True)]) is DecodeStatus.OK
    assert 0 <= engine.sample(99, sampler) < engine.limits.n_vocab


def test_an_aborted_state_is_forgotten(tiny_mamba: Path):
    """Half an update cannot be undone: the sequence starts again, others go on."""
    engine = opened(tiny_mamba)
    engine.decode([Span(0, 0, numbers(8), True), Span(1, 0, numbers(5), True)])
    engine.abort_flag.raise_()
    assert engine.decode([Span(0, 8, numbers(20), True)]) is DecodeStatus.ABORTED
    engine.abort_flag.clear()
    assert [engine.seq_end(0), engine.seq_end(1)] == [0, 5]
    assert engine.decode([Span(0, 0, numbers(8), True)]) is DecodeStatus.OK
    assert engine.decode([Span(1, 5, ids(1), True)]) is DecodeStatus.OK
    engine.close()


def test_abort_ends_a_long_prefill_within_it(smollm2_path: Path):
    """From another thread, in the middle of one llama_decode; what is left can be continued."""
    engine = opened(smollm2_path)
    prompt = numbers(500)
    clock = time.pthread_getcpuclockid(threading.get_ident())
    started = time.clock_gettime(clock)
    assert engine.decode([Span(0, 0, prompt, True)]) is DecodeStatus.OK
    whole = time.clock_gettime(clock) - started
    engine.seq_clear(0)
    middle = time.clock_gettime(clock) + whole / 8
    raised = in_thread(lambda: (wait_until(lambda: time.clock_gettime(clock) > middle), engine.abort_flag.raise_()))
    assert engine.decode([Span(0, 0, prompt, True)]) is DecodeStatus.ABORTED
    raised()
    engine.abort_flag.clear()
    end = engine.seq_end(0)
    assert 0 <= end < 500
    assert engine.decode([Span(0, end, prompt[end : end + 16], True)]) is DecodeStatus.OK
    engine.close()


def test_an_aborted_embedding_says_so(engine: LlamaEngine):
    engine.embed([numbers(4)])
    engine.abort_flag.raise_()
    with pytest.raises(GenerationError, match="ABORTED"):
        engine.embed([numbers(4)])
    engine.abort_flag.clear()
    assert engine.embed([numbers(4)]).shape == (1, engine.limits.n_embd)


def test_a_closed_engine_refuses_everything(tiny_llama: Path):
    engine = opened(tiny_llama)
    engine.decode([Span(0, 0, numbers(8), True)])
    sampler = engine.new_sampler(SamplingParams(), ids())
    engine.close()
    engine.close()
    calls: list[Callable[[], object]] = [
        lambda: engine.decode([Span(0, 8, ids(1), True)]),
        lambda: engine.sample(7, sampler),
        lambda: engine.logits(7),
        lambda: engine.new_sampler(SamplingParams(), ids()),
        lambda: engine.seq_end(0),
        lambda: engine.seq_trim(0, 1),
        lambda: engine.seq_clear(0),
        lambda: engine.seq_share(0, 1, 4),
        lambda: engine.seq_save(0),
        lambda: engine.seq_restore(0, b"", 1),
        lambda: engine.embed([ids(1)]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert sampler.closed, "closing the engine frees the samplers first"
    sampler.close()


def test_another_thread_is_refused(engine: LlamaEngine):
    calls: list[Callable[[], object]] = [
        lambda: engine.decode([Span(0, 8, ids(1), True)]),
        lambda: engine.logits(7),
        lambda: engine.seq_clear(0),
        engine.close,
    ]
    refused: list[str] = []

    def meddle() -> None:
        for call in calls:
            with pytest.raises(RuntimeError) as raised:
                call()
            refused.append(str(raised.value))

    thread = threading.Thread(target=meddle)
    thread.start()
    thread.join()
    assert len(refused) == len(calls)
    assert all("thread" in text for text in refused)
    assert engine.seq_end(0) == 8


@pytest.mark.parametrize(("temperature", "where"), [(0.8, 5), (0.0, 0)])
def test_logits_that_are_no_numbers_are_refused(engine: LlamaEngine, temperature: float, where: int):
    """Sorting NaN is undefined behaviour in C++: it can write outside its memory.

    A greedy chain does not sort; it could only choose such a logit, the first one if that is NaN.
    """
    sampler = engine.new_sampler(SamplingParams(temperature=temperature), ids())
    logits = engine.logits(7)
    for bad in (np.nan, np.inf):
        kept, logits[where] = logits[where], bad
        with pytest.raises(GenerationError, match="finite"):
            engine.sample(7, sampler)
        logits[where] = kept
    assert 0 <= engine.sample(7, sampler) < engine.limits.n_vocab


REFUSED_PARAMS = {
    "token beyond the vocabulary": SamplingParams(logit_bias={512: 1.0}),  # type: ignore[arg-type]
    "negative token": SamplingParams(logit_bias={-1: 1.0}),  # type: ignore[arg-type]
    "every token banned": SamplingParams(logit_bias=dict.fromkeys(range(512), float("-inf"))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("params", REFUSED_PARAMS.values(), ids=REFUSED_PARAMS.keys())
def test_impossible_sampling_is_refused(engine: LlamaEngine, params: SamplingParams):
    with pytest.raises(InvalidRequestError):
        engine.new_sampler(params, ids())
    assert 0 <= engine.sample(7, engine.new_sampler(SamplingParams(), ids())) < engine.limits.n_vocab


def test_a_ban_that_leaves_nothing_is_an_error_not_a_banned_token(engine: LlamaEngine):
    """One token is allowed, and DRY pushes it below every number."""
    only = dict.fromkeys((token for token in range(512) if token != 300), float("-inf"))
    params = SamplingParams(logit_bias=only, dry_multiplier=100.0, dry_base=100.0, dry_allowed_length=0)  # type: ignore[arg-type]
    sampler = engine.new_sampler(params, np.full(200, 300, np.int32))
    with pytest.raises(GenerationError, match="no token was left"):
        engine.sample(7, sampler)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_accepted_sampling_parameters_end_the_process(tiny_llama: Path, seed: int):
    """Random absurd combinations, each sampled three times, in a process of their own."""
    script = Path(__file__).with_name("absurd_sampling.py")
    command = [sys.executable, str(script), str(tiny_llama), str(seed), "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "400"


RUNS = {
    "letters": "aB" * 500_000,
    "one letter": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "newlines": "\n" * 1_000_000,
    "punctuation": "!" * 1_000_000,
    "han": "中" * 300_000,
    "NUL": "\0" * 1_000_000,
    "combining": "e\u0301" * 300_000,
}


@pytest.fixture(scope="session")
def regex_vocabulary(synth_folder: Path) -> LlamaVocabulary:
    """Bytes only, with a pre-tokenizer that llama.cpp runs as a std::regex."""
    return LlamaVocabulary(_byte_vocabulary(synth_folder / "bytes.gguf", "gpt-4o"))


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS.keys())
def test_a_megabyte_without_a_space_neither_crashes_nor_hangs(regex_vocabulary: LlamaVocabulary, text: str):
    """std::regex recurses per character: uncut, 50,000 of them overflow a stack of 8 MiB."""
    started = time.thread_time()
    tokens = regex_vocabulary.tokenize(text, add_special=False, parse_special=True)
    assert b"".join(regex_vocabulary.pieces[token] for token in tokens) == text.encode()
    assert time.thread_time() - started < 60


def test_a_cut_never_divides_a_control_token(regex_vocabulary: LlamaVocabulary):
    text = "".join("x" * (4096 - shift) + "<|end|>" for shift in range(9)) + "y" * 5000
    tokens = regex_vocabulary.tokenize(text, add_special=False, parse_special=True)
    assert tokens.tolist().count(257) == 9
    plain = regex_vocabulary.tokenize(text, add_special=False, parse_special=False)
    assert plain.tolist().count(257) == 0
    assert b"".join(regex_vocabulary.pieces[token] for token in plain) == text.encode()


def test_text_that_is_no_unicode_is_refused(regex_vocabulary: LlamaVocabulary):
    with pytest.raises(InvalidRequestError, match="Unicode") as refused:
        regex_vocabulary.tokenize("secret \ud800", add_special=False, parse_special=False)
    assert "secret" not in str(refused.value)


def test_a_model_without_a_vocabulary_is_refused(tmp_path: Path):
    """Tokenizing without one aborts."""
    path = tmp_path / "silent.gguf"
    writer = _metadata(path)
    writer.add_tokenizer_model("no_vocab")
    _write(writer)
    with pytest.raises(ModelLoadError, match="vocabulary"):
        LlamaVocabulary(path)


def test_a_damaged_model_is_a_load_error_with_the_reason(tmp_path: Path):
    path = _byte_vocabulary(tmp_path / "weightless.gguf", "gpt-2")
    with pytest.raises(ModelLoadError, match=r"weightless\.gguf"):
        load(ModelConfig(model=str(path), n_ctx=256))


def test_only_one_copy_of_each_native_library_is_mapped(engine: LlamaEngine):
    """A second libggml would have backends and callbacks of its own."""
    assert engine.seq_end(0) == 8
    maps = Path("/proc/self/maps")
    if not maps.exists():
        assert ctypes.CDLL(None), "no process maps on this system; nothing to look at"
        return
    files = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "/lib" in line}
    for name in ("libllama.so", "libggml.so", "libggml-base.so"):
        assert len([file for file in files if Path(file).name.startswith(name)]) <= 1, name


def _byte_vocabulary(path: Path, pre: str) -> Path:
    writer = _metadata(path)
    tokens = [*_byte_letters(), "ab", "<|end|>", "<|user|>"]
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    _write(writer)
    return path


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def _metadata(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(259)
    return writer


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
