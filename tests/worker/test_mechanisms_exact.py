"""The exact tier (see `test_exactness`) of preemption, adapters and drafts, on each kind of memory that allows it.

A window that drops cells is of the numeric tier here: with others in the batch, and in chunks with an adapter, its
logits differ by 0.04. Drafts are for what can be cut back. Each is shown able to fail by an error of one token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_worker._kv_ops import apply
from tests import synth, synth_lora
from tests.worker.probe import Mistake
from tests.worker.test_checkpoints import MODELS as FIXTURES
from tests.worker.test_exactness import OTHERS, WORDS, Run, same
from tests.worker.test_lora_engine import MATRICES
from tests.worker.test_speculation_exact import answers, one_too_many

pytestmark = pytest.mark.engine

KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llama": (lambda path: synth.llama(path, weights="q8_0"), {}),
    **{kind: other for kind, other in OTHERS.items() if kind != "dropping window"},  # type: ignore[dict-item]
}


@pytest.fixture
def model(kind: str, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    make, settings = KINDS[kind]
    return make(tmp_path / "tiny.gguf"), settings


@pytest.fixture(scope="module")
def text() -> str:
    rng = np.random.default_rng(3)
    return " ".join(rng.choice(WORDS.split()) for _ in range(420))


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_that_was_preempted_goes_on_the_same(model: Any, text: str, forgets: bool):
    """From RAM; without its last token, it does not."""
    path, settings = model
    with Run(path, **settings) as run:
        whole = run.answers(text)[0]
    with Run(path, **settings) as run:
        sinks = [run.begin(f"one {text}"), run.begin(text)]
        scheduler = run.bench.scheduler
        while sum(g.is_decoding for g in scheduler.running) < 2:
            run.bench.step()
        run.bench.step(2)
        apply(run.bench.service.loaded, scheduler.preempt())  # type: ignore[arg-type]
        victim = scheduler.waiting[0]
        if forgets:
            victim.tokens.truncate(victim.tokens.n - 1)
        run.bench.settle(*sinks)
        assert scheduler.cache.tier.counts.hits or forgets
        ids, logits = run.probe.answer(victim.command.job.prompt)
    found = ids, np.stack(logits)
    assert same(found, whole) is not forgets


@pytest.mark.parametrize("mistake", [None, "shifted span"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_an_adapter_too_warm_is_cold(kind: str, mistake: Mistake | None, model: Any, text: str, tmp_path: Path):
    """Cut back, or gone back to a checkpoint, in chunks."""
    path, settings = model
    adapter = synth_lora.lora(tmp_path / "style.gguf", path, matrices=MATRICES[FIXTURES[kind][0]])
    settings = {**settings, "lora_paths": {"style": str(adapter)}}
    prompt = text + " tell me about the other thing now"
    asked = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "loras": "style"}

    def answer(run: Run, prompt: str) -> Any:
        run.bench.settle(run.bench.ask(prompt, **asked)[0])
        key = id(run.probe.samplers[-1])
        return run.probe.chosen[key], np.stack(run.probe.logits_of[key])

    with Run(path, **settings) as run:
        whole = answer(run, prompt)
    with Run(path, mistake, n_ubatch=96, **settings) as run:
        answer(run, text + " and what of this one thing?")
        warm = answer(run, prompt)
    assert same(warm, whole) is (mistake is None)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("kind", ["full window"])
def test_drafts_change_nothing(model: Any, text: str, wrong: bool, monkeypatch: pytest.MonkeyPatch):
    """On plain attention: see `test_speculation_exact`."""
    path, settings = model
    (expected,), _ = answers(path, [text], config=settings)
    if wrong:
        monkeypatch.setattr("llama_worker._decoding.common_prefix", one_too_many)
    (found,), metrics = answers(path, [text], [expected[0]], config=settings)
    assert metrics.accepted_drafts
    assert same(found, expected) is not wrong
