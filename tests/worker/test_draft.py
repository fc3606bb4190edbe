"""The draft model: its guesses are what it would say, and nothing but time depends on them. On both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_worker import (
    ConfigError,
    Finished,
    GenerationError,
    LlamaWorker,
    ModelConfig,
    ModelNotFoundError,
    WorkerConfig,
    cancel_scope,
    plan_memory,
)
from llama_worker._draft import DraftModel
from llama_worker._engine.base import DecodeStatus, Engine, Floats, LoadedModel, Loader, TokenIds
from llama_worker._engine.llama import load
from llama_worker._registry import _key
from llama_worker._snapshots import metrics_of
from llama_worker._speculation import FIRST_CHANCE, Drafter, Speculation
from llama_worker._tokens import TokenBuffer
from llama_worker.testing import FakeEngine, Fault, fake_limits, fake_loader, fake_worker
from tests import synth, synth_lora
from tests.worker.test_exactness import WORDS, same
from tests.worker.test_speculation_exact import Answer, Run, one_too_many
from tests.worker.waiting import wait_until

MANY = 10_000
FAKE = {"draft_model": "fake://small", "speculation": "on"}


def text(n: int, first: int = 40) -> TokenIds:
    """Ids of both engines."""
    return (first + np.arange(n, dtype=np.int32) % 60).astype(np.int32)


def on(engine: str, path: Path, **config: Any) -> Engine:
    settings = {"n_ctx": 1024, "n_parallel": 3, "n_threads": 1, **config}
    if engine == "fake":
        return FakeEngine(fake_limits(ModelConfig(model="fake://small", **settings)))
    return load(ModelConfig(model=str(path), **settings)).engine


@pytest.fixture(params=["fake", pytest.param("llama.cpp", marks=pytest.mark.engine)])
def opened(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Callable[..., DraftModel]]:
    drafts: list[DraftModel] = []

    def open_draft(ends: frozenset[int] = frozenset(), n_vocab: int = 0, **config: Any) -> DraftModel:
        engine = on(request.param, tiny_llama, **config)
        drafts.append(DraftModel(engine, ends, n_vocab or engine.limits.n_vocab))
        return drafts[-1]

    yield open_draft
    for draft in drafts:
        draft.close()


def alone(opened: Callable[..., DraftModel], tokens: TokenIds, n: int) -> list[int]:
    """What a fresh draft model says behind `tokens`."""
    return opened().guess([(0, tokens)], n, MANY)[0].tolist()


# -- what it guesses


def test_a_guess_is_what_it_says_token_by_token(opened: Callable[..., DraftModel]):
    draft = opened()
    tokens = text(50)
    for _ in range(4):
        tokens = np.append(tokens, draft.guess([(0, tokens)], 1, MANY)[0])
    assert tokens[50:].tolist() == alone(opened, text(50), 4)


def test_what_came_true_is_kept_and_what_did_not_is_taken_back(opened: Callable[..., DraftModel]):
    draft = opened()
    first = draft.guess([(0, text(50))], 4, MANY)[0]
    for said in (first, np.append(first[:2], 7), np.array([7], np.int32)):
        tokens = np.append(text(50), said).astype(np.int32)
        assert draft.guess([(0, tokens)], 3, MANY)[0].tolist() == alone(opened, tokens, 3)


def test_several_texts_are_guessed_as_each_alone(opened: Callable[..., DraftModel]):
    texts = [(seq, text(40 + 7 * seq, first=40 + seq)) for seq in range(3)]
    found = opened().guess(texts, 5, MANY)
    assert [guess.tolist() for guess in found] == [alone(opened, tokens, 5) for _, tokens in texts]


def test_a_long_text_is_brought_up_to_date_bit_by_bit(opened: Callable[..., DraftModel]):
    draft = opened()
    found = [draft.guess([(0, text(100)), (1, text(10))], 2, 40) for _ in range(3)]
    assert [list(map(len, guesses)) for guesses in found] == [[0, 0], [0, 0], [2, 2]]
    assert [guess.tolist() for guess in found[2]] == [alone(opened, text(n), 2) for n in (100, 10)]


def test_nothing_is_guessed_behind_an_end(opened: Callable[..., DraftModel]):
    whole = alone(opened, text(50), 6)
    end = next(i for i in range(6) if whole[i] not in whole[:i] and i)
    draft = opened(ends=frozenset([whole[end]]))
    assert draft.guess([(0, text(50))], 6, MANY)[0].tolist() == whole[: end + 1]


def test_a_token_that_the_model_does_not_have_is_not_guessed(opened: Callable[..., DraftModel]):
    whole = alone(opened, text(50), 6)
    highest = max(whole)
    at = whole.index(highest)
    draft = opened(n_vocab=highest)
    assert draft.guess([(0, text(50))], 6, MANY)[0].tolist() == whole[:at]


def test_who_does_not_speak_makes_room(opened: Callable[..., DraftModel]):
    draft = opened(n_ctx=256)
    assert len(draft.guess([(0, text(150))], 2, MANY)[0])
    found = draft.guess([(1, text(150, first=50))], 2, MANY)[0]
    assert found.tolist() == alone(opened, text(150, first=50), 2)


def test_who_finds_no_room_is_left_out_for_a_while(opened: Callable[..., DraftModel]):
    """Two texts in room for one: the other is guessed from then on, and nobody fails."""
    draft = opened(n_ctx=256)
    texts = [(0, text(160)), (1, text(140, first=50))]
    found = [[len(guess) for guess in draft.guess(texts, 2, MANY)] for _ in range(3)]
    assert max(found[0]) < 2
    assert sorted(found[1]) == [0, 2]
    assert found[2] == found[1]


def test_a_text_that_is_too_long_or_has_other_tokens_is_not_guessed(opened: Callable[..., DraftModel]):
    draft = opened(n_ctx=256)
    beyond = np.append(text(20), draft.engine.limits.n_vocab).astype(np.int32)
    found = draft.guess([(0, text(256)), (1, beyond), (2, text(20))], 2, MANY)
    assert [len(guess) for guess in found] == [0, 0, 2]


def test_after_an_aborted_call_it_guesses_rightly(opened: Callable[..., DraftModel]):
    draft = opened()
    draft.guess([(0, text(50))], 2, MANY)
    draft.engine.abort_flag.raise_()
    assert not len(draft.guess([(0, text(90))], 2, MANY)[0])
    draft.engine.abort_flag.clear()
    assert draft.guess([(0, text(90))], 2, MANY)[0].tolist() == alone(opened, text(90), 2)


def test_an_engine_that_fails_says_so():
    engine = FakeEngine(fake_limits(ModelConfig(model="fake://small")), faults=[fault(DecodeStatus.COMPUTE_FAILED)])
    draft = DraftModel(engine, frozenset(), engine.limits.n_vocab)
    with pytest.raises(GenerationError, match="draft model returned -3"):
        draft.guess([(0, text(50))], 2, MANY)
    draft.close()


def fault(how: Any, nth: int = 1) -> Fault:
    return Fault("decode", how, nth)


# -- whom it is asked for


class Speaker:
    """As much of a Generation as a Speculation asks about."""

    def __init__(self, tokens: TokenIds, *, always: bool = False) -> None:
        self.tokens = TokenBuffer(tokens)
        self.room = 100
        self.drafter = Drafter(self.tokens, 200, always=always)


def speculation(*costs: float, **config: Any) -> Speculation:
    """One that knows what steps of 1, 2, 3 … rows take."""
    limits = fake_limits(ModelConfig(model="fake://m", n_parallel=1, speculation="auto", **config))
    known = Speculation(limits)
    for rows, ms in enumerate(costs, start=1):
        for _ in range(2):
            known.observe(rows, ms)
    return known


FREE = [10.0] * 16
"""Sixteen rows take as long as one."""


def test_it_is_asked_where_rows_are_free_and_not_where_they_cost():
    speaker: Any = Speaker(text(20))
    assert speculation(*FREE).to_guess([speaker], 1, 100)[0] == [speaker]
    assert speculation(*[10.0 * rows for rows in range(1, 17)]).to_guess([speaker], 1, 100) == ([], 0)


def test_what_guessing_takes_counts_once_it_was_tried_twice():
    speaker: Any = Speaker(text(20))
    for ms, pays in ((1.0, True), (9.0, False)):
        known = speculation(*FREE)
        for _ in range(2):
            assert known.to_guess([speaker], 1, 100)[0] == [speaker]
            known.observe_guess(ms)
        assert bool(known.to_guess([speaker], 1, 100)[0]) is pays


def test_what_did_not_pay_is_tried_again_after_a_while():
    speaker: Any = Speaker(text(20))
    known = speculation(*FREE)
    for _ in range(2):
        known.observe_guess(100.0)
    n_steps = 0
    while not known.to_guess([speaker], 1, 100)[0]:
        known.observe(1, 10.0)
        n_steps += 1
    assert 200 < n_steps < 2000


def test_a_call_that_reads_a_prompt_says_nothing_of_what_a_token_takes(opened: Callable[..., DraftModel]):
    draft = opened()
    times = []
    for n in (200, 203, 207):
        draft.guess([(0, text(n))], 2, MANY)
        times.append(draft.token_ms is not None)
    assert times == [False, True, True]


def test_who_must_be_guessed_is_asked_for_whatever_it_costs():
    speaker: Any = Speaker(text(20), always=True)
    known = speculation(*[10.0 * rows for rows in range(1, 17)])
    for _ in range(2):
        known.observe_guess(100.0)
    asked, n = known.to_guess([speaker], 1, 100)
    assert asked == [speaker]
    assert n == speaker.drafter.of_model.n_likely


def test_a_text_that_repeats_itself_is_not_asked_for_once_that_came_true():
    speaker: Any = Speaker(np.tile(text(10), 4), always=True)
    known = speculation(*FREE)
    assert known.to_guess([speaker], 1, 100)[0] == []
    speaker.drafter.of_text.chances[0] = FIRST_CHANCE / 2
    assert known.to_guess([speaker], 1, 100)[0] == [speaker]


def test_a_repetition_is_followed_while_the_model_is_asked():
    drafter = Drafter(tokens := TokenBuffer(np.tile(text(10), 4)), 200, always=True)
    drafter.of_text.chances[0] = FIRST_CHANCE / 2
    drafter.offer(np.array([1, 2, 3], np.int32))
    assert drafter.propose(8).tolist() == [1, 2, 3]
    tokens.extend(text(10))
    drafter.propose(8)
    assert drafter.of_text.chances[0] > FIRST_CHANCE / 2


def test_each_kind_of_guess_learns_from_itself():
    drafter = Drafter(tokens := TokenBuffer(text(20)), 200, always=True)
    drafter.offer(np.array([1, 2, 3], np.int32))
    drafter.drafts(drafter.propose(3))
    tokens.extend(np.array([1, 2, 3, 4], np.int32))
    drafter.propose(3)
    assert drafter.of_model.chances[2] > FIRST_CHANCE**3
    assert drafter.of_text.chances[0] == FIRST_CHANCE


def test_an_offer_is_of_the_tokens_that_it_was_made_for():
    drafter = Drafter(tokens := TokenBuffer(text(20)), 200, always=True)
    drafter.offer(np.array([1, 2, 3], np.int32))
    tokens.append(9)
    assert not len(drafter.propose(3))


# -- what is said


def replies(worker: LlamaWorker, **params: Any) -> list[str]:
    prompts = [f"{WORDS} {i}" for i in range(5)]
    return [reply.text for reply in worker.infer_batch(prompts, max_tokens=40, ignore_eos=True, **params)]  # type: ignore[union-attr]


class Erring(FakeEngine):
    """As the model, but for every seventh token."""

    def _logits(self, row: int) -> Floats:
        logits = super()._logits(row)
        return -logits if len(self._outputs[row]) // 4 % 7 == 0 else logits


def erring(config: ModelConfig) -> LoadedModel:
    own = config.of_draft(4096)
    draft = None if own is None else Erring(fake_limits(own))
    return replace(fake_loader()(config), draft=draft)


KNOWING: dict[str, Loader] = {
    "all": fake_loader(),
    "most": erring,
    "nothing": fake_loader("what nobody could have foreseen, in so many words, is this: " * 2),
}
"""Loaders of models of which the draft model knows so much."""


@pytest.mark.parametrize("knows", KNOWING)
def test_what_is_said_does_not_depend_on_it(knows: str):
    loader = KNOWING[knows]
    with (
        fake_worker(loader=loader, n_parallel=2) as plain,
        fake_worker(loader=loader, n_parallel=2, **FAKE) as drafting,
    ):
        assert replies(drafting) == replies(plain)
        metrics = drafting.metrics()
    assert metrics.drafted_tokens > 50
    right = metrics.accepted_drafts / metrics.drafted_tokens
    least, most = {"all": (0.95, 1.0), "most": (0.3, 0.95), "nothing": (0.0, 0.1)}[knows]
    assert least <= right <= most


def test_a_guess_taken_for_right_changes_what_is_said(monkeypatch: pytest.MonkeyPatch):
    """The proof that the test above can fail."""
    with fake_worker(n_parallel=2) as plain:
        expected = replies(plain)
    monkeypatch.setattr("llama_worker._decoding.common_prefix", one_too_many)
    with fake_worker(loader=erring, n_parallel=2, **FAKE) as drafting:
        assert replies(drafting) != expected


@pytest.mark.parametrize("nth", [1, 2, 9])
@pytest.mark.parametrize(
    "how",
    [
        DecodeStatus.COMPUTE_FAILED,
        DecodeStatus.ABORTED,
        DecodeStatus.KV_FULL,
        MemoryError("no memory is left"),
        ValueError("what nobody thought of"),
    ],
)
def test_a_draft_model_that_fails_fails_nobody(how: Any, nth: int):
    def broken(engine: FakeEngine) -> None:
        if not engines:
            engine.faults.append(fault(how, nth))
        engines.append(engine)

    engines: list[FakeEngine] = []
    with (
        fake_worker(n_parallel=2) as plain,
        fake_worker(loader=fake_loader(seen=broken), n_parallel=2, **FAKE) as drafting,
    ):
        assert replies(drafting) == replies(plain)
        assert drafting.status().state == "ready"
    assert engines[0].closed
    assert engines[1].closed


def test_cancelling_ends_a_guess_that_does_not_end():
    def hanging(engine: FakeEngine) -> None:
        if not engines:
            engine.faults.append(fault("hang"))
        engines.append(engine)

    engines: list[FakeEngine] = []
    with fake_worker(loader=fake_loader(seen=hanging), **FAKE) as worker:
        with cancel_scope() as scope:
            stream = worker.stream("hello", max_tokens=40)
        assert engines[0].hanging.wait(30)
        scope.cancel()
        *_, last = stream
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        assert worker.generate("hello", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4


def test_the_watchdog_ends_a_guess_that_does_not_end_and_nobody_fails():
    def hanging(engine: FakeEngine) -> None:
        if not engines:
            engine.faults.append(fault("hang"))
        engines.append(engine)

    engines: list[FakeEngine] = []
    with (
        fake_worker() as plain,
        fake_worker(loader=fake_loader(seen=hanging), worker_config=WorkerConfig(step_timeout=0.2), **FAKE) as drafting,
    ):
        assert replies(drafting) == replies(plain)
    assert engines[0].calls.count("decode") == 1, "it is asked no more"


@pytest.mark.engine
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 7}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("twin", [True, False])
def test_on_llama_cpp_ids_and_logits_are_those_of_a_run_without(
    tiny_llama_q8: Path,
    tmp_path: Path,
    params: dict[str, Any],
    twin: bool,
    wrong: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    """The exact tier, with a draft model that is the model itself, and one that is another."""
    draft = tiny_llama_q8 if twin else synth.llama(tmp_path / "other.gguf", n_layer=1, seed=5)
    rng = np.random.default_rng(5)
    prompt = " ".join(rng.choice(WORDS.split()) for _ in range(420))

    def answer(**config: Any) -> tuple[Answer, int]:
        with Run(tiny_llama_q8, n_threads=1, **config) as run:
            asked = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True, **params}
            run.bench.settle(run.bench.ask(prompt, **asked)[0])
            key = id(run.probe.samplers[0])
            found = run.probe.chosen[key], np.stack(run.probe.logits_of[key])
            return found, metrics_of(run.bench.service).drafted_tokens

    expected, _ = answer()
    if wrong:
        monkeypatch.setattr("llama_worker._decoding.common_prefix", one_too_many)
    found, n_drafted = answer(speculation="on", draft_model=str(draft))
    assert n_drafted > 20
    assert same(found, expected) is not (wrong and not (twin and not params))


# -- how it is opened


def with_another_token(model: Path, path: Path) -> Path:
    """The same file, but that one word of its vocabulary is another."""
    data = model.read_bytes()
    word = next(word for word in (b"river", b"stone", b"garden", b"light", b"water") if data.count(word) == 1)
    path.write_bytes(data.replace(word, word[::-1]))
    return path


@pytest.mark.engine
def test_a_draft_model_that_cannot_guess_is_refused(
    tiny_llama: Path, tiny_mamba: Path, tiny_bert: Path, tmp_path: Path
):
    larger = synth.llama(tmp_path / "larger.gguf", n_vocab=synth.N_VOCAB + 300)
    other = synth.llama(tmp_path / "other.gguf", space_prefix=True)
    reordered = with_another_token(tiny_llama, tmp_path / "reordered.gguf")
    for draft, how, reason in (
        (tiny_llama, "off", "speculation is 'off'"),
        (tiny_bert, "on", "only embeds"),
        (tiny_mamba, "on", "cannot take tokens back"),
        (larger, "on", "tokens"),
        (reordered, "on", "its token"),
    ):
        with pytest.raises(ConfigError, match=reason) as refused:
            load(ModelConfig(model=str(tiny_llama), draft_model=draft, speculation=how, n_ctx=256))  # type: ignore[arg-type]
        assert refused.value.field == "draft_model"
    with pytest.raises(ConfigError, match="tiny-mamba cannot take tokens back"):
        load(ModelConfig(model=str(tiny_mamba), draft_model=tiny_llama, speculation="on"))
    with pytest.raises(ModelNotFoundError, match="draft_model="):
        load(ModelConfig(model=str(tiny_llama), draft_model=tmp_path / "no.gguf", speculation="on"))
    assert load(ModelConfig(model=str(tiny_llama), draft_model=other, speculation="on", n_ctx=256)).draft is not None


@pytest.mark.engine
def test_a_reload_to_one_that_cannot_guess_keeps_the_model(tiny_llama: Path, tiny_mamba: Path):
    config = ModelConfig(model=str(tiny_llama), n_ctx=256, n_threads=1)
    with LlamaWorker(config) as worker:
        before = worker.generate("hello", max_tokens=8, temperature=0.0).text
        with pytest.raises(ConfigError, match="cannot take tokens back"):
            worker.reload(draft_model=str(tiny_mamba), speculation="on")
        assert worker.generate("hello", max_tokens=8, temperature=0.0).text == before
        worker.reload(draft_model=str(tiny_llama), speculation="on")
        assert worker.generate("hello", max_tokens=8, temperature=0.0).text == before
        assert worker.metrics().accepted_drafts


@pytest.mark.engine
def test_the_memory_plan_counts_it(tiny_llama: Path):
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, speculation="on", load_mode="none")
    plan, with_draft = plan_memory(config), plan_memory(config.model_copy(update={"draft_model": str(tiny_llama)}))
    assert plan.draft == 0
    assert with_draft.weights == 2 * plan.weights
    assert plan.kv < with_draft.draft <= plan.kv + plan.compute
    assert with_draft.needed_ram == plan.needed_ram + plan.weights + with_draft.draft
    assert with_draft.total == plan.total + plan.weights + with_draft.draft


def test_it_has_the_context_of_the_model():
    config = ModelConfig(model="m.gguf", draft_model="d.gguf", n_ctx=0, swa_full=False, cache_dir="/tmp/x")
    own = config.of_draft(n_ctx_train=8192)
    assert own is not None
    assert (own.model, own.n_ctx, own.swa_full, own.cache_dir, own.draft_model) == ("d.gguf", 8192, True, None, None)


@pytest.mark.engine
def test_both_loads_are_one_progress(tiny_llama: Path):
    heard: list[float] = []
    config = ModelConfig(model=str(tiny_llama), n_ctx=256, n_threads=1)
    with LlamaWorker(config) as worker:
        worker.reload(draft_model=str(tiny_llama), speculation="on", progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert any(0.4 < fraction < 0.6 for fraction in heard)


def test_an_idle_model_goes_with_it_and_comes_back_with_it():
    engines: list[FakeEngine] = []
    loader = fake_loader(seen=engines.append)
    with fake_worker(loader=loader, worker_config=WorkerConfig(keep_alive=0.0), **FAKE) as worker:
        first = worker.generate("hello", max_tokens=20, ignore_eos=True).text
        wait_until(lambda: worker.status().state == "unloaded")
        assert all(engine.closed for engine in engines)
        n_before = len(engines)
        assert worker.generate("hello", max_tokens=20, ignore_eos=True).text == first
    assert len(engines) == n_before + 2
    assert all(engine.closed for engine in engines)


@pytest.mark.engine
@pytest.mark.parametrize("asked", ["schema", "adapter"])
def test_with_a_schema_or_an_adapter_the_same_is_said(tiny_llama: Path, tmp_path: Path, asked: str):
    adapter = synth_lora.lora(tmp_path / "style.gguf", tiny_llama)
    form = {"type": "json_schema", "json_schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 4}}
    how: dict[str, Any] = {"schema": {"response_format": form}, "adapter": {"loras": "style"}}[asked]
    said = []
    for settings in ({}, {"draft_model": str(tiny_llama), "speculation": "on"}):
        paths = {"style": str(adapter)}
        config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1, lora_paths=paths, **settings)  # type: ignore[arg-type]
        with LlamaWorker(config) as worker:
            prompt = [{"role": "user", "content": "count"}]
            said.append(worker.generate(prompt, max_tokens=40, temperature=0.0, **how).text)
    assert said[0] == said[1]


def test_diagnostics_show_its_name_and_not_where_it_lies():
    with fake_worker(draft_model="/home/somebody/small.gguf", speculation="on") as worker:
        assert "somebody" not in str(worker.diagnostics())
        assert "small.gguf" in str(worker.diagnostics())


def test_two_spellings_of_its_path_are_one_worker():
    given = (ModelConfig(model="m.gguf", draft_model=path) for path in ("d.gguf", "./d.gguf"))
    assert len({_key(config, WorkerConfig()) for config in given}) == 1
