"""LoRA adapters in an engine: they compute what merged weights would, and nothing is continued with other ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_worker import LoraLoadError, ModelConfig
from llama_worker._engine.base import DecodeStatus, Engine, Floats, Span, StateError, TokenIds
from llama_worker._engine.llama import LlamaEngine, load
from llama_worker._identity import BASE, KVIdentity
from llama_worker._snapshots import cache_metrics_of, metrics_of
from llama_worker.testing import FakeEngine, fake_limits
from tests import synth_lora
from tests.worker.bench import Bench
from tests.worker.probe import Probe, probed

pytestmark = pytest.mark.engine

PRECISE = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
TIGHT = 1e-3  # of logits whose standard deviation is 1; an adapter changes them by more than 0.3
MATRICES = {
    "tiny_llama": synth_lora.MATRICES,
    "tiny_swa": synth_lora.MATRICES,
    "tiny_mamba": ("ssm_in", "ssm_out"),
    "tiny_lfm2": (*synth_lora.MATRICES, "in_proj", "out_proj"),
}


def opened(path: Path, **changes: object) -> LlamaEngine:
    settings: dict[str, object] = {"n_ctx": 1024, "n_parallel": 4, "n_threads": 1, **PRECISE} | changes
    engine = load(ModelConfig(model=str(path), **settings)).engine  # type: ignore[arg-type]
    assert isinstance(engine, LlamaEngine)
    return engine


def numbers(n: int, first: int = 20) -> TokenIds:
    return (first + np.arange(n, dtype=np.int32) * 7 % 200).astype(np.int32)


def logits_after(engine: Engine, tokens: TokenIds, seq: int = 0) -> Floats:
    """The logits after each of the last eight of `tokens`, in an emptied sequence."""
    engine.seq_clear(seq)
    rows = []
    for chunk in [tokens[:-7], *np.split(tokens[-7:], 7)]:
        assert engine.decode([Span(seq, engine.seq_end(seq), chunk, True)]) is DecodeStatus.OK
        rows.append(engine.logits(len(chunk) - 1).copy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def style(tiny_llama: Path, synth_folder: Path) -> Path:
    return synth_lora.lora(synth_folder / "style.gguf", tiny_llama)


@pytest.fixture(scope="module")
def facts(tiny_llama: Path, synth_folder: Path) -> Path:
    return synth_lora.lora(
        synth_folder / "facts.gguf", tiny_llama, seed=2, rank=8, alpha=16.0, matrices=("attn_v", "ffn_up")
    )


# --- what they compute


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("scale", [1.0, 0.25, -0.5])
def test_an_adapter_computes_what_merged_weights_do(
    name: str, scale: float, request: pytest.FixtureRequest, tmp_path: Path
):
    model = request.getfixturevalue(name)
    path = synth_lora.lora(tmp_path / "adapter.gguf", model, matrices=MATRICES[name])
    engine, other = opened(model), opened(synth_lora.merged(model, tmp_path / "merged.gguf", (path, scale)))
    base = logits_after(engine, numbers(40))
    engine.use_loras(KVIdentity.of([(engine.load_lora(str(path)).digest, scale)]))
    adapted, expected = logits_after(engine, numbers(40)), logits_after(other, numbers(40))
    np.testing.assert_allclose(adapted, expected, rtol=0, atol=TIGHT)
    assert np.abs(adapted - base).max() > 0.3, "an adapter that changed nothing would be merged just as well"
    engine.close()
    other.close()


def test_two_adapters_compose(tiny_llama: Path, style: Path, facts: Path, tmp_path: Path):
    engine = opened(tiny_llama)
    both = synth_lora.merged(tiny_llama, tmp_path / "merged.gguf", (style, 0.8), (facts, 0.3))
    other = opened(both)
    scaled = [(engine.load_lora(str(path)).digest, scale) for path, scale in ((style, 0.8), (facts, 0.3))]
    engine.use_loras(KVIdentity.of(scaled))
    np.testing.assert_allclose(logits_after(engine, numbers(40)), logits_after(other, numbers(40)), rtol=0, atol=TIGHT)
    engine.close()
    other.close()


def test_the_model_itself_is_what_it_was(tiny_llama: Path, style: Path):
    """Bit for bit: before an adapter is loaded, beside it, with its scale at 0, after its use, and without it."""
    engine = opened(tiny_llama)
    base = logits_after(engine, numbers(40))
    digest = engine.load_lora(str(style)).digest
    np.testing.assert_array_equal(logits_after(engine, numbers(40)), base)
    assert not engine.use_loras(KVIdentity.of([(digest, 0.0)]))
    assert engine.use_loras(KVIdentity.of([(digest, 1.0)]))
    adapted = logits_after(engine, numbers(40))
    assert engine.use_loras(BASE)
    np.testing.assert_array_equal(logits_after(engine, numbers(40)), base)
    assert engine.use_loras(KVIdentity.of([(digest, 1.0)]))
    np.testing.assert_array_equal(logits_after(engine, numbers(40)), adapted)
    engine.free_lora(digest)
    np.testing.assert_array_equal(logits_after(engine, numbers(40)), base)
    engine.close()


def test_sequences_of_different_adapters_live_side_by_side(tiny_llama: Path, style: Path, facts: Path):
    """They take turns, and none notices the others."""
    engine = opened(tiny_llama)
    sets = [BASE, *(KVIdentity.of([(engine.load_lora(str(path)).digest, 1.0)]) for path in (style, facts))]
    alone = []
    for kv in sets:
        engine.use_loras(kv)
        alone.append(logits_after(engine, numbers(40)))
    tokens, rows = numbers(40), [list[Floats]() for _ in sets]
    for seq in range(4):
        engine.seq_clear(seq)
    for chunk in [tokens[:-7], *np.split(tokens[-7:], 7)]:
        for seq, kv in enumerate(sets):
            engine.use_loras(kv)
            assert engine.decode([Span(seq, engine.seq_end(seq), chunk, True)]) is DecodeStatus.OK
            rows[seq].append(engine.logits(len(chunk) - 1).copy())
    for mixed, expected in zip(rows, alone, strict=True):
        np.testing.assert_allclose(np.stack(mixed), expected, rtol=0, atol=TIGHT)
    engine.close()


def test_cells_of_other_adapters_are_wrong_ones(tiny_llama: Path, style: Path):
    """What the engine refuses below would show: the logits differ by far more than any rounding."""
    engine = opened(tiny_llama)
    base = logits_after(engine, numbers(40))
    kv = KVIdentity.of([(engine.load_lora(str(style)).digest, 1.0)])
    engine.use_loras(kv)
    logits_after(engine, numbers(40)[:-7])
    engine.use_loras(BASE)
    generator = engine._generator
    assert generator is not None
    generator.sequences.marks = [BASE.mark] * 4  # as if they were the model's own
    rows = []
    for token in numbers(40)[-7:]:
        assert engine.decode([Span(0, engine.seq_end(0), np.array([token]), True)]) is DecodeStatus.OK
        rows.append(engine.logits(0).copy())
    assert np.abs(np.stack(rows) - base[1:]).max() > 0.3
    engine.close()


# --- the contract, of both engines


@pytest.fixture(params=["fake", "llama", "fake hybrid", "hybrid"])
def contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Engine, KVIdentity]]:
    """An engine, and a set of one adapter that is loaded."""
    if request.param.startswith("fake"):
        config = ModelConfig(model="fake://model", n_ctx=2048)
        engine: Engine = FakeEngine(replace(fake_limits(config, hybrid="hybrid" in request.param)))
        path = "fake://style"
    else:
        name = "tiny_lfm2" if request.param == "hybrid" else "tiny_llama"
        model = request.getfixturevalue(name)
        engine = opened(model)
        path = str(synth_lora.lora(tmp_path / "style.gguf", model, matrices=MATRICES[name]))
    yield engine, KVIdentity.of([(engine.load_lora(path).digest, 1.0)])
    engine.close()


def fill(engine: Engine, n: int = 40, seq: int = 0) -> None:
    assert engine.decode([Span(seq, engine.seq_end(seq), numbers(n), True)]) is DecodeStatus.OK


def goes_on(engine: Engine, seq: int = 0) -> None:
    assert engine.decode([Span(seq, engine.seq_end(seq), numbers(1), True)]) is DecodeStatus.OK


def test_only_a_change_is_one(contract: tuple[Engine, KVIdentity]):
    engine, kv = contract
    assert [engine.use_loras(kv) for kv in (BASE, kv, kv, BASE, kv)] == [False, True, False, True, True]


def test_an_adapter_that_is_not_loaded_cannot_be_used(contract: tuple[Engine, KVIdentity]):
    engine, kv = contract
    engine.use_loras(kv)
    fill(engine)
    for wrong in (KVIdentity.of([("0" * 32, 1.0)]), KVIdentity.of([(f"{i:032}", 1.0) for i in range(9)])):
        with pytest.raises(ValueError):
            engine.use_loras(wrong)
    goes_on(engine)


def test_a_sequence_goes_on_with_its_own_adapters_only(contract: tuple[Engine, KVIdentity]):
    engine, kv = contract
    fill(engine)
    engine.use_loras(kv)
    with pytest.raises(ValueError, match="other adapters"):
        goes_on(engine)
    assert engine.seq_end(0) == 40
    engine.use_loras(BASE)
    goes_on(engine)
    engine.use_loras(KVIdentity.of([(kv.loras[0][0], 0.5)]))
    with pytest.raises(ValueError, match="other adapters"):
        goes_on(engine)
    engine.seq_clear(0)
    fill(engine)


def test_what_is_shared_and_what_is_restored_belongs_to_the_same_adapters(contract: tuple[Engine, KVIdentity]):
    engine, kv = contract
    engine.use_loras(kv)
    fill(engine)
    engine.seq_restore(1, engine.seq_save(0), 40)
    held = [1]
    if engine.limits.can_share:
        engine.seq_share(0, 2, 30)
        held.append(2)
    engine.use_loras(BASE)
    for seq in held:
        with pytest.raises(ValueError, match="other adapters"):
            goes_on(engine, seq)
    engine.use_loras(kv)
    for seq in held:
        goes_on(engine, seq)


def test_a_checkpoint_is_not_put_over_cells_of_other_adapters(contract: tuple[Engine, KVIdentity]):
    engine, kv = contract
    if not engine.limits.needs_checkpoints:
        pytest.skip("it goes back to any place")
    fill(engine)
    state = engine.seq_save(0, partial=True)
    engine.use_loras(kv)
    fill(engine, seq=1)
    with pytest.raises(StateError, match="other adapters"):
        engine.seq_restore(1, state, 40)
    assert engine.seq_end(1) == 0
    with pytest.raises(ValueError):
        engine.seq_restore(1, state, 40, donor=1)
    engine.seq_restore(1, state, 40, donor=0)
    engine.use_loras(BASE)
    goes_on(engine, 1)


def test_freed_in_use_it_is_used_no_longer(contract: tuple[Engine, KVIdentity]):
    engine, kv = contract
    engine.use_loras(kv)
    fill(engine)
    engine.free_lora(kv.loras[0][0])
    engine.free_lora(kv.loras[0][0])
    assert not engine.use_loras(BASE)
    fill(engine, seq=1)
    with pytest.raises(ValueError):
        engine.use_loras(kv)
    goes_on(engine, 1)


def test_a_file_that_is_not_there_is_named(contract: tuple[Engine, KVIdentity], tmp_path: Path):
    engine, _ = contract
    with pytest.raises(LoraLoadError, match=r"absent\.gguf.*no such file"):
        engine.load_lora(str(tmp_path / "absent.gguf"))


def test_the_same_content_is_loaded_once(tiny_llama: Path, style: Path, tmp_path: Path):
    engine = opened(tiny_llama)
    first = engine.load_lora(str(style))
    (tmp_path / "copy.gguf").write_bytes(style.read_bytes())
    second = engine.load_lora(str(tmp_path / "copy.gguf"))
    assert (second.digest, second.size, second.rank, second.alpha) == (first.digest, first.size, 4, 4.0)
    engine.use_loras(KVIdentity.of([(first.digest, 0.5), (second.digest, 0.5)]))
    halves = logits_after(engine, numbers(40))
    engine.use_loras(KVIdentity.of([(first.digest, 1.0)]))
    np.testing.assert_array_equal(logits_after(engine, numbers(40)), halves)
    engine.close()


# --- a worker of them


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_requests_of_different_sets_at_once_say_what_each_model_would(
    speculation: str, tiny_llama: Path, style: Path, facts: Path, tmp_path: Path
):
    """The numeric tier: each emitted token is nearly the likeliest one of a model with these adapters merged in.

    With evictions, preemption and the RAM tier on the way: there are cells for two of the six.
    """
    sets: list[dict[str, float]] = [{}, {"style": 1.0}, {"facts": 0.5}, {"style": 0.3, "facts": 1.0}]
    paths = {"style": style, "facts": facts}
    probes: list[Probe] = []
    bench = Bench(
        loader=probed(load, probes),
        model=str(tiny_llama),
        lora_paths=paths,
        n_ctx=512,
        n_kv_cells=768,
        n_parallel=6,
        n_threads=1,
        speculation=speculation,
        **PRECISE,
    ).load()
    bench.check = bench.scheduler.cache.check  # type: ignore[method-assign]
    head = "the river and the stone " * 12
    asked = [(head + f"agent {i % 3}", sets[i % 4]) for i in range(24)]
    how = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
    sinks = [bench.ask(p, loras=loras, **how)[0] for p, loras in asked]
    bench.settle(*sinks, most=20_000)
    assert bench.service.loras.snapshot({})["style"].switches > 4
    assert cache_metrics_of(bench.service).reused_tokens > 500
    assert (metrics_of(bench.service).drafted_tokens > 0) == (speculation == "on")
    view = bench.published.view(0)
    assert view is not None
    for number, loras in enumerate(sets):
        merges = [(paths[name], scale) for name, scale in loras.items()]
        truth = opened(synth_lora.merged(tiny_llama, tmp_path / f"{number}.gguf", *merges))
        for (prompt, wanted), sink in zip(asked, sinks, strict=True):
            said = [entry.token for entry in sink.terminal.logprobs]
            worst = shortfall(truth, view.prompt_tokens(prompt), said)
            assert worst <= 0.05 if wanted == loras else worst > 0.2, (loras, wanted)
        truth.close()
    bench.shut_down()


def shortfall(engine: Engine, prompt: TokenIds, said: Sequence[int]) -> float:
    """By how much the tokens that were said lie below the likeliest ones, at most."""
    engine.seq_clear(0)
    assert engine.decode([Span(0, 0, prompt, True)]) is DecodeStatus.OK
    worst, row = 0.0, len(prompt) - 1
    for token in said:
        logits = engine.logits(row)
        worst, row = max(worst, float(logits.max() - logits[token])), 0
        assert engine.decode([Span(0, engine.seq_end(0), np.array([token]), True)]) is DecodeStatus.OK
    return worst


def test_the_demo_model_takes_an_adapter(smollm2_path: Path, tmp_path: Path):
    """Quantised weights, an adapter in F32; what is its own is untouched, and scales matter."""
    path = synth_lora.lora(tmp_path / "style.gguf", smollm2_path, rank=2, alpha=0.5, matrices=("attn_v", "ffn_down"))
    engine = opened(smollm2_path, n_ctx=512)
    base = logits_after(engine, numbers(24))
    digest, rows = engine.load_lora(str(path)).digest, []
    for scale in (1.0, 0.5):
        engine.use_loras(KVIdentity.of([(digest, scale)]))
        rows.append(logits_after(engine, numbers(24)))
    engine.use_loras(BASE)
    np.testing.assert_array_equal(logits_after(engine, numbers(24)), base)
    assert np.abs(rows[0] - base).max() > np.abs(rows[1] - base).max() > 0.1
    engine.close()
