"""The exact tier on the real engine: ids and logits are bit-equal however a prompt came into the cache.

llama.cpp's CPU kernels change with the shape of a batch, so this holds for one configuration only:
q8_0 K and V, flash attention, quantised weights, more than 1,000 cells in use, cells in the order of
positions. Every claim is shown able to fail: the same test with an error of one token finds it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from llama_worker import ModelConfig
from llama_worker._engine.base import DecodeStatus, Span
from llama_worker._engine.llama import load
from llama_worker._prefix_cache import PrefixCache
from llama_worker._slot import Slot
from llama_worker._tokens import TokenIds
from tests import synth
from tests.worker.bench import Bench, ListSink
from tests.worker.probe import Mistake, Probe, probed

pytestmark = pytest.mark.engine

EXACT = {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"}
N = 12
WORDS = "alpha beta gamma delta river stone cloud winter summer engine model agent tool search index"


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("tiny_llama_q8" if request.param == "synthesised" else "smollm2_path")


def on_both(name: str, right: object, other: object) -> pytest.MarkDecorator:
    """`right` and `other`, which is a mistake in most tests, on both models.

    With q8_0 K and V a prefill of SmolLM2 takes 15 seconds of a core: there only the full count runs it.
    """
    smollm2 = [pytest.param("smollm2", value, marks=pytest.mark.proof) for value in (right, other)]
    cases = [("synthesised", right), ("synthesised", other), *smollm2]
    return pytest.mark.parametrize(("model", name), cases, indirect=["model"])


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    """Somewhat more than 1,000 tokens of either model."""
    rng = np.random.default_rng(3)
    return " ".join(rng.choice(WORDS.split()) for _ in range(1050 if "Smol" in model.name else 420))


class Run:
    """One engine, driven step by step. Usage: with `Run(model) as run: run.ask(...)`."""

    def __init__(
        self, model: Path, mistake: Mistake | None = None, *, off_by_one: bool = False, **config: object
    ) -> None:
        self.probes: list[Probe] = []
        # Two threads share the rows of the small model; a big one's would wait for each other whenever a core is taken.
        n_threads = 2 if "tiny" in model.name else 1
        fixed = {"n_ctx": 4096, "n_kv_cells": 8192, "n_parallel": 4, "n_threads": n_threads, **EXACT}
        settings = {"model": str(model), **fixed, **config}
        # No latency budget: prompts are prefilled beside decoding rows as fast as a batch takes them.
        self.bench = Bench(loader=probed(load, self.probes, mistake), step_budget_ms=1e6, **settings).load()
        self.bench.check = self.bench.scheduler.cache.check  # type: ignore[method-assign]
        if off_by_one:
            make_off_by_one(self.bench.scheduler.cache)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bench.shut_down()

    @property
    def probe(self) -> Probe:
        return self.probes[0]

    def begin(self, prompt: str, n: int = N) -> ListSink:
        return self.bench.ask(prompt, max_tokens=n, temperature=0.0, ignore_eos=True)[0]

    def answers(self, *prompts: str) -> list[tuple[list[int], np.ndarray]]:
        """Ids and logits of each prompt's answer, all asked at once."""
        first = len(self.probe.samplers)
        sinks = [self.begin(prompt) for prompt in prompts]
        self.bench.settle(*sinks)
        # Samplers are made at admission; a shared prefix may change that order, the prompts' ends tell.
        keys = [id(sampler) for sampler in self.probe.samplers[first:]]
        return [(self.probe.chosen[key], np.stack(self.probe.logits_of[key])) for key in keys]


def make_off_by_one(cache: PrefixCache) -> None:
    """A cache that takes one token more for common than is."""
    usable = cache.reach.usable

    def wrong(slot: Slot, prompt: TokenIds) -> int:
        length = usable(slot, prompt)
        return min(length + 1, slot.n, len(prompt) - 1) if length else 0

    cache.reach.usable = wrong  # type: ignore[method-assign]


@lru_cache(maxsize=16)
def cold(model: Path, prompt: str) -> tuple[list[int], np.ndarray]:
    """The answer of a fresh engine, its prompt decoded in one piece."""
    with Run(model, n_ubatch=2048) as run:
        return run.answers(prompt)[0]


def same(a: tuple[list[int], np.ndarray], b: tuple[list[int], np.ndarray]) -> bool:
    return a[0] == b[0] and np.array_equal(a[1], b[1])


@on_both("wrong", False, True)
def test_warm_equals_cold(model: Path, text: str, wrong: bool):
    """A prompt that begins like the last one, then differs, answers as in a fresh engine."""
    prompt = text + " tell me about the other thing now"
    with Run(model, off_by_one=wrong) as run:
        run.bench.settle(run.begin(text + " and what of this one thing?"))
        warm = run.answers(prompt)[0]
    assert same(warm, cold(model, prompt)) is not wrong


@on_both("wrong", False, True)
def test_shared_equals_own(model: Path, text: str, wrong: bool):
    """A prefix taken from a running sequence by seq_cp answers as one computed for itself."""
    prompt = text + " tell me about the other thing now"
    with Run(model, off_by_one=wrong) as run:
        busy = run.begin(text + " and what of this one thing?", n=60)
        while not run.bench.scheduler.running or not run.bench.scheduler.running[0].is_decoding:
            run.bench.step()
        n_busy = run.bench.scheduler.running[0].n_resident
        shared = run.answers(prompt)[0]
        assert not busy.is_answered
        assert run.bench.scheduler.cache.cells.free > 8192 - n_busy - 200
    assert same(shared, cold(model, prompt)) is not wrong


@on_both("mistake", None, "other row")
def test_batched_equals_alone(model: Path, text: str, mistake: Mistake | None):
    names = ("one", "two", "three")[: 3 if "tiny" in model.name else 1]
    prompts = [text, *(f"{name} {text} {name}?" for name in names)]
    with Run(model, mistake) as run:
        together = run.answers(*prompts)
        assert run.probe.most_outputs == len(prompts)
    alone = [cold(model, prompt) for prompt in prompts]
    matched = [any(same(answer, reference) for answer in together) for reference in alone]
    assert all(matched) is (mistake is None)


@on_both("mistake", None, "shifted span")
def test_chunked_equals_whole(model: Path, text: str, mistake: Mistake | None):
    with Run(model, mistake, n_ubatch=96) as run:
        chunked = run.answers(text)[0]
    assert same(chunked, cold(model, text)) is (mistake is None)


@on_both("mistake", None, "shifted after abort")
def test_cancelled_then_continued_equals_uninterrupted(model: Path, text: str, mistake: Mistake | None):
    """A decode is aborted inside the prompt and its request cancelled; the same prompt again goes on from there."""
    with Run(model, mistake, n_ubatch=128) as run:
        sink, cancel = run.bench.ask(text, max_tokens=N, temperature=0.0)
        run.bench.step(4)
        run.probe.abort_next = True
        run.bench.step()
        cancel.cancel()
        run.bench.settle(sink)
        assert run.probe.n_aborted == 1
        assert sink.terminal.usage.completion_tokens == 0
        continued = run.answers(text)[0]
        assert next(iter(run.bench.scheduler.cache.slots)).n > 128
    assert same(continued, cold(model, text)) is (mistake is None)


@pytest.mark.parametrize("when", ["prompt", "decode"])
@pytest.mark.parametrize("model", ["synthesised"], indirect=True)
def test_an_abort_that_nobody_asked_for_changes_nothing(model: Path, text: str, when: str):
    """The flag may be raised late, for a request that is gone: those in the batch answer as if it had not been."""
    with Run(model, n_ubatch=128) as run:
        sink = run.begin(text)
        run.bench.step(3 if when == "prompt" else 14)
        run.probe.abort_next = True
        run.bench.settle(sink)
        key = id(run.probe.samplers[0])
        interrupted = run.probe.chosen[key], np.stack(run.probe.logits_of[key])
        assert run.bench.service.n_aborts == 1
    assert same(interrupted, cold(model, text))


OTHERS = {
    "full window": (lambda path: synth.swa(path, weights="q8_0"), {}),
    "dropping window": (lambda path: synth.swa(path, weights="q8_0"), {"swa_full": False}),
    "recurrent": (lambda path: synth.mamba(path, weights="q8_0"), {}),
    "hybrid": (lambda path: synth.lfm2(path, weights="q8_0", head=32), {}),  # q8_0 takes heads of 32 and more
}


@pytest.mark.parametrize("mistake", [None, "shifted span"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_memory_are_exact_too(kind: str, mistake: Mistake | None, tmp_path: Path):
    """In chunks = whole, and warm (cut back, or gone back to a checkpoint) = cold."""
    make, settings = OTHERS[kind]
    path = make(tmp_path / "model.gguf")
    rng = np.random.default_rng(3)
    text = " ".join(rng.choice(WORDS.split()) for _ in range(420))
    prompt = text + " tell me about the other thing now"
    with Run(path, **settings) as run:
        whole = run.answers(prompt)[0]
    with Run(path, mistake, n_ubatch=96, **settings) as run:
        run.bench.settle(run.begin(text + " and what of this one thing?"))
        warm = run.answers(prompt)[0]
    assert same(warm, whole) is (mistake is None)


@pytest.mark.parametrize("wrong", [False, True])
def test_what_cells_out_of_order_change_of_a_dropping_window_is_rounding(wrong: bool, tmp_path: Path):
    """Three that grow in turn take each other's dropped cells. In F32 without flash attention next to nothing is left.

    With q8_0 cells and weights it is 0.06. One wrong token among the last shows as 0.1 and more.
    """
    path = synth.swa(tmp_path / "model.gguf")
    rng = np.random.default_rng(1)
    texts = [rng.integers(300, 500, 600).astype(np.int32) for _ in range(3)]
    alone = [grown(path, [text])[0] for text in texts]
    if wrong:
        texts[1][-3] = 299
    together = grown(path, texts)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True))
    print(f"logits differ by {difference:.6f}")
    assert (difference > 0.1) if wrong else (difference < 0.002)


def grown(path: Path, texts: list[TokenIds]) -> list[np.ndarray]:
    """The logits after each of `texts`, of which 40 tokens are decoded in turn, never two texts in one decode."""
    settings = {"n_ctx": 4096, "n_parallel": 4, "n_threads": 1, "type_k": "f32", "type_v": "f32", "flash_attn": "off"}
    engine = load(ModelConfig(model=str(path), swa_full=False, **settings)).engine  # type: ignore[arg-type]
    last: dict[int, np.ndarray] = {}
    for at in range(0, len(texts[0]), 40):
        for seq, text in enumerate(texts):
            assert engine.decode([Span(seq, at, text[at : at + 40], True)]) is DecodeStatus.OK
            last[seq] = engine.logits(39).copy()
    engine.close()
    return [last[seq] for seq in range(len(texts))]
