"""Drafts: when they are made, and that nothing but time depends on them. On the fake engine; no model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llama_worker import InvalidRequestError, ModelConfig, UnsupportedFeatureError
from llama_worker._engine.base import MOST_DRAFTS, DecodeStatus, Floats, LoadedModel, Loader, Span, outputs_of
from llama_worker._snapshots import metrics_of
from llama_worker._speculation import SIZES, Costs, Drafter, Speculation, how_many
from llama_worker._tokens import TokenBuffer, common_prefix
from llama_worker.testing import ByteTokenizer, FakeEngine, Fault, fake_info, fake_limits, fake_loader
from tests.constraint.walks import PROOF
from tests.worker.bench import Bench, ListSink

LOOP = "one two three. one two three. one two"


class Forgetful(FakeEngine):
    """Its next token depends on the last one only, so that its text runs in circles and can be guessed.

    But for every `period`th token, which depends on all: there guesses are wrong.
    """

    period = 13

    def _logits(self, row: int) -> Floats:
        seen = self._outputs[row]
        if len(seen) // 4 % self.period:
            self._outputs[row] = seen[-4:]
        try:
            return super()._logits(row)
        finally:
            self._outputs[row] = seen


def forgetful(seen: Callable[[FakeEngine], Any], *faults: Fault) -> Loader:
    def load(config: ModelConfig) -> LoadedModel:
        engine = Forgetful(fake_limits(config), faults=list(faults))
        seen(engine)
        return LoadedModel(engine=engine, vocabulary=ByteTokenizer(), info=fake_info(config))

    return load


def bench_of(*faults: Fault, speculation: str = "on", **config: Any) -> Bench:
    engines: list[FakeEngine] = []
    bench = Bench(loader=forgetful(engines.append, *faults), speculation=speculation, **config)
    bench.engines = engines
    checked = bench.check

    def check() -> None:
        checked()
        for generation in bench.scheduler.running:
            held = generation.slot.tokens.view
            assert held.tolist() == generation.tokens.part(0, len(held)).tolist(), "the slot holds another text"
            assert generation.n_left >= 1

    bench.check = check  # type: ignore[method-assign]
    return bench.load()


def answers(bench: Bench, *prompts: str, **params: Any) -> list[ListSink]:
    sinks = [bench.ask(prompt, **{"max_tokens": 80, "ignore_eos": True, **params})[0] for prompt in prompts]
    bench.settle(*sinks)
    return sinks


# -- what is said


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_what_is_said_does_not_depend_on_drafts(n_parallel: int) -> None:
    prompts = [f"{LOOP} {i}" for i in range(5)]
    without, with_ = (bench_of(speculation=how, n_parallel=n_parallel) for how in ("off", "on"))
    for a, b in zip(answers(without, *prompts), answers(with_, *prompts), strict=True):
        assert (a.text, a.terminal.usage) == (b.text, b.terminal.usage)
    metrics = metrics_of(with_.service)
    assert metrics.accepted_drafts > 100
    assert metrics.drafted_tokens > metrics.accepted_drafts, "none was wrong: then nothing was shown"
    assert metrics.decodes < metrics_of(without.service).decodes * 0.7


def test_a_draft_that_is_taken_for_right_changes_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the test above can fail: one draft too many is taken for what was said."""
    from llama_worker import _decoding
    from llama_worker._tokens import common_prefix

    monkeypatch.setattr(_decoding, "common_prefix", lambda a, b: min(common_prefix(a, b) + 1, len(a), len(b)))
    wrong = bench_of()
    wrong.check = lambda: None  # type: ignore[method-assign]
    prompts = [f"{LOOP} {i}" for i in range(3)]
    said = [sink.text for sink in answers(wrong, *prompts)]
    assert said != [sink.text for sink in answers(bench_of(speculation="off"), *prompts)]


def test_a_slot_is_left_as_it_would_be_without_drafts() -> None:
    """Also when the reply ended in the midst of drafts: by its length, a stop string or the end token."""
    for params in ({"max_tokens": 37}, {"stop": ("m",)}, {"max_tokens": 400, "ignore_eos": False}):
        held = []
        for how in ("off", "on"):
            bench = bench_of(speculation=how, n_parallel=1)
            answers(bench, LOOP, **params)
            held.append(bench.scheduler.cache.slots[0].tokens.view.tolist())
        short, long = sorted(held, key=len)
        assert long[: len(short)] == short
        assert len(long) - len(short) <= 1, "one draft more than without may have been right"


def test_every_event_comes_as_without() -> None:
    def texts(how: str) -> list[str]:
        (sink,) = answers(bench_of(speculation=how), LOOP, logprobs=0)
        return [getattr(event, "text", "") for event in sink.events]

    assert texts("on") == texts("off")


def test_a_cancel_between_two_rows_of_drafts_leaves_a_slot_to_go_on_from() -> None:
    """The flag may be set at any moment; the slot holds what was said until then, but for the last token."""
    bench = bench_of()
    sink, cancel = bench.ask(LOOP, max_tokens=80, ignore_eos=True)
    sample = bench.engine.sample

    def sampled(row: int, sampler: Any, mask: Any = None) -> int:
        if row == 1 and len(bench.engine._outputs) > 4:
            cancel.cancel()
        return sample(row, sampler, mask)

    bench.step(2)
    bench.engine.sample = sampled  # type: ignore[method-assign]
    while not cancel.is_set:
        bench.step()
    bench.settle(sink)
    assert sink.terminal.reason == "cancelled"
    whole = answers(bench_of(speculation="off"), LOOP)[0].text
    assert whole.startswith(sink.text)
    assert answers(bench, LOOP)[0].text == whole


def test_no_more_is_drafted_than_may_be_said() -> None:
    bench = bench_of()
    decode, furthest = bench.engine.decode, 0

    def watched(spans: list[Span]) -> DecodeStatus:
        nonlocal furthest
        furthest = max(furthest, *[span.start + len(span.tokens) for span in spans])
        return decode(spans)

    bench.engine.decode = watched  # type: ignore[method-assign,assignment]
    (sink,) = answers(bench, LOOP, max_tokens=50)
    assert furthest == sink.terminal.usage.prompt_tokens + 50 - 1


def test_a_scripted_reply_ends_where_it_ends() -> None:
    reply = "alpha beta gamma. " * 12
    bench = Bench(reply, speculation="on").load()
    (sink,) = answers(bench, "say it", max_tokens=None, ignore_eos=False)
    assert sink.text == reply
    assert sink.terminal.usage.completion_tokens == len(reply)
    assert metrics_of(bench.service).accepted_drafts > len(reply) / 2


def test_a_schema_holds_with_drafts() -> None:
    """The mask of each row is that of the text up to it, and tokens that must come are no drafts."""
    schema = {"type": "array", "items": {"enum": ["left", "right"]}, "minItems": 20, "maxItems": 20}
    form = {"type": "json_schema", "json_schema": schema}
    texts = []
    for how in ("off", "on"):
        bench = Bench('["left", "right", ' * 10, speculation=how).load()
        (sink,) = answers(
            bench, [{"role": "user", "content": "go"}], response_format=form, max_tokens=None, ignore_eos=False
        )
        texts.append(sink.text)
        assert sink.terminal.reason == "stop"
    assert texts[0] == texts[1]
    assert texts[0].count("left") + texts[0].count("right") == 20


# -- interruptions


@pytest.mark.parametrize("seed", range(200 if PROOF else 20))
def test_cancels_aborts_and_full_caches_leave_the_books_right(seed: int) -> None:
    """Whoever is not cancelled says what he would say alone, without drafts."""
    rng = random.Random(seed)
    how: list[DecodeStatus] = [DecodeStatus.ABORTED, DecodeStatus.KV_FULL]
    faults = [Fault("decode", rng.choice(how), nth=nth) for nth in rng.sample(range(2, 60), 6)]
    bench = bench_of(*faults, n_parallel=3, n_ctx=192, n_kv_cells=rng.choice([192, 256, 1024]), n_ubatch=32)
    prompts = [f"{LOOP} {rng.randrange(9)}" for _ in range(8)]
    asked = [bench.ask(prompt, max_tokens=rng.randrange(20, 90), ignore_eos=True) for prompt in prompts]
    cancelled = {i for i in range(8) if rng.random() < 0.3}
    for _ in range(3000):
        if all(sink.is_answered for sink, _ in asked):
            break
        if rng.random() < 0.05 and cancelled:
            asked[rng.choice(sorted(cancelled))][1].cancel()
        bench.step()
    for i, (prompt, (sink, _)) in enumerate(zip(prompts, asked, strict=True)):
        alone = answers(bench_of(speculation="off"), prompt, max_tokens=90)[0].text
        assert alone.startswith(sink.text)
        assert i in cancelled or sink.terminal.reason == "length"
    assert metrics_of(bench.service).accepted_drafts


def test_drafts_go_before_anything_else_when_cells_run_out() -> None:
    bench = bench_of(n_parallel=2, n_ctx=256, n_kv_cells=256)
    answers(bench, "something to keep for the next one", max_tokens=4)
    kept = [slot.n for slot in bench.scheduler.cache.slots]
    sink, _ = bench.ask(LOOP, max_tokens=180, ignore_eos=True)
    bench.step(10)
    bench.engine.hidden_cells = 256 - bench.engine.cells_used - 1
    while not metrics_of(bench.service).kv_recoveries and not sink.is_answered:
        bench.engine.hidden_cells = 256 - bench.engine.cells_used - 1
        bench.step()
    assert max(kept) in [slot.n for slot in bench.scheduler.cache.slots], "it evicted somebody to guess"
    assert not sink.is_answered
    assert metrics_of(bench.service).preemptions == 0


# -- when


def cost_of(*table: tuple[int, float]) -> Callable[[int], float]:
    return lambda rows: float(np.interp(rows, [n for n, _ in table], [ms for _, ms in table]))


GPU = cost_of((1, 10.0), (16, 11.0), (32, 14.0))
FEW_CORES = cost_of((1, 8.0), (4, 31.0), (8, 36.0), (16, 70.0))  # measured; see docs/speculation.md
LINEAR = cost_of((0, 0.0), (100, 800.0))


@pytest.mark.parametrize(
    ("cost", "n", "chance", "drafts"),
    [
        (GPU, 1, 0.9, 15),
        (GPU, 1, 0.5, 7),
        (GPU, 1, 0.15, 3),
        (GPU, 1, 0.05, 0),
        (GPU, 8, 0.9, 15),
        (FEW_CORES, 1, 0.99, 7),
        (FEW_CORES, 1, 0.9, 7),
        (FEW_CORES, 1, 0.8, 0),
        (FEW_CORES, 1, 0.5, 0),
        (LINEAR, 1, 1.0, 0),
        (LINEAR, 8, 1.0, 0),
    ],
)
def test_as_many_are_drafted_as_pay(cost: Callable[[int], float], n: int, chance: float, drafts: int) -> None:
    chances = [chance**k for k in range(1, MOST_DRAFTS + 1)]
    assert how_many(n, chances, cost(n), cost) == drafts


def test_no_more_are_drafted_than_there_are_guesses() -> None:
    assert [how_many(1, [0.99] * n, 10.0, GPU) for n in (0, 1, 2, 6, 7, 14)] == [0, 1, 1, 3, 7, 7]
    assert SIZES[-1] == MOST_DRAFTS


def test_what_was_never_tried_is_believed_to_be_free_and_tried_twice() -> None:
    costs = Costs(16)
    assert costs.known(1) is None
    costs.observe(1, 8.0)
    assert costs.known(1) is None
    costs.observe(1, 9.0)
    assert costs.known(1) == pytest.approx(8.1)
    assert [costs.expected(rows, 1, 8.1) for rows in (2, 4, 8, 16)] == [8.1, 8.1, 8.1, math.inf]
    costs.observe(8, 90.0)
    assert costs.expected(8, 1, 8.1) == 8.1
    costs.observe(8, 36.0)
    assert costs.expected(8, 1, 8.1) == 36.0


def test_costs_between_known_ones_are_thought_to_grow_evenly() -> None:
    costs = Costs(16)
    for rows, ms in ((1, 8.0), (8, 36.0)) * 2:
        costs.observe(rows, ms)
    assert [costs.expected(rows, 1, 8.0) for rows in (2, 4, 8, 16)] == pytest.approx([12, 20, 36, 68])
    costs.observe(4, 31.0)
    costs.observe(4, 31.0)
    assert [costs.expected(rows, 1, 8.0) for rows in (2, 4, 8, 16)] == pytest.approx([8 + 23 / 3, 31, 36, 68])


def test_what_few_rows_cost_says_nothing_of_many() -> None:
    """Two conversations at once have shown that two rows take twice as long as one: eight are tried all the same."""
    costs = Costs(16)
    for rows, ms in ((1, 8.0), (2, 16.0)) * 2:
        costs.observe(rows, ms)
    assert [costs.expected(rows, 1, 8.0) for rows in (2, 8, 16)] == [16.0, 8.0, math.inf]


def test_a_hiccup_raises_a_cost_little_and_a_faster_step_lowers_it_at_once() -> None:
    costs = Costs(16)
    for _ in range(5):
        costs.observe(1, 8.0)
    costs.observe(1, 28.0)
    assert costs.known(1) == pytest.approx(10.0)
    costs.observe(1, 8.0)
    assert costs.known(1) == 8.0


def test_what_did_not_pay_is_tried_again_less_and_less_often() -> None:
    costs = Costs(16)
    costs.observe(8, 50.0)
    tries = []
    for step in range(20_000):
        costs.observe(1, 8.0)
        if costs.expected(8, 1, 8.0) == 8.0:
            costs.observe(8, 50.0)
            tries.append(step)
    gaps = np.diff(tries[1:])
    assert len(tries) < 8
    assert all(gaps[1:] > 1.5 * gaps[:-1])


def fed(drafter: Drafter, tokens: TokenBuffer, reply: list[int], n_drafts: int) -> Drafter:
    """`drafter` after `reply` came, with `n_drafts` drafts a step."""
    while reply:
        guess = drafter.propose(MOST_DRAFTS)
        if n := min(n_drafts, len(guess)):
            drafter.drafts(guess)
        came = 1 + common_prefix(guess[:n], np.array(reply, np.int32))
        tokens.extend(np.array(reply[:came], np.int32))
        reply = reply[came:]
    return drafter


@pytest.mark.parametrize("n_drafts", [0, 1, 3, 7])
def test_chances_are_how_far_the_latest_guesses_came_true(n_drafts: int) -> None:
    """Whether they were drafted or only followed."""
    tokens = TokenBuffer(np.arange(100, dtype=np.int32))
    drafter = Drafter(tokens, 3000, always=False)
    fed(drafter, tokens, [*range(100)] * 6, n_drafts)
    assert min(drafter.chances[: max(n_drafts, 7 if not n_drafts else 1)]) > 0.9
    short = [token for run in range(90) for token in (run, run + 1, run + 2, run + 3, run + 4, 1000 + run)]
    fed(drafter, tokens, short, n_drafts)  # runs of five: three to find the place, two guesses come true
    assert drafter.chances[0] > 0.5
    assert max(drafter.chances[2:]) < 0.2
    assert drafter.chances == sorted(drafter.chances, reverse=True)


class TimedBench(Bench):
    """Its steps take what `cost` says of their rows."""

    def __init__(self, cost: Callable[[int], float], **config: Any) -> None:
        self.cost = cost
        self.rows: list[int] = []
        self.n_steps_with_drafts = 0
        seen: list[FakeEngine] = []
        super().__init__(loader=forgetful(seen.append), **{"speculation": "auto", **config})
        self.engines = seen
        self.load()
        decode = self.engine.decode

        def timed(spans: list[Span]) -> DecodeStatus:
            rows = sum(len(span.tokens) for span in spans)
            if all(span.output for span in spans):
                self.rows.append(rows)
                self.n_steps_with_drafts += any(span.output > 1 for span in spans)
            self.now += self.cost(rows) / 1000
            return decode(spans)

        self.engine.decode = timed  # type: ignore[method-assign,assignment]

    def repeats_long(self) -> TimedBench:
        """Its text has long runs between two places that nobody can guess."""
        assert isinstance(self.engine, Forgetful)
        self.engine.period = 61
        return self

    def seconds(self, how: bool | None = None, n: int = 1, max_tokens: int = 400) -> float:
        before = self.now
        asked = {"max_tokens": max_tokens, "ignore_eos": True, "speculate": how}
        self.settle(*[self.ask(f"{LOOP} {i}", **asked)[0] for i in range(n)], most=10_000)
        return self.now - before


def test_auto_drafts_where_it_pays() -> None:
    bench, without = TimedBench(GPU).repeats_long(), TimedBench(GPU, speculation="off").repeats_long()
    assert bench.seconds() < 0.3 * without.seconds()


@pytest.mark.parametrize("n", [1, 4])
def test_auto_stays_off_where_a_row_costs_a_step(n: int) -> None:
    """After the trials nothing is drafted, and they cost little."""
    bench = TimedBench(LINEAR)
    first = bench.seconds(n=n)
    assert first < 1.15 * TimedBench(LINEAR, speculation="off").seconds(n=n)
    before = bench.n_steps_with_drafts
    assert 0 < before <= 3 * n
    bench.seconds(n=n)
    assert bench.n_steps_with_drafts - before <= n


def test_auto_pays_where_only_certain_drafts_do() -> None:
    bench, without = (TimedBench(FEW_CORES, speculation=how).repeats_long() for how in ("auto", "off"))
    bench.seconds()
    assert bench.seconds(max_tokens=800) < 0.75 * without.seconds(max_tokens=800)


def test_auto_never_costs_much() -> None:
    """Whatever a row costs, and however well a text can be guessed."""
    for rows_by_eights in (1.0, 4.0, 8.0):
        cost = cost_of((1, 8.0), (8, 8.0 * rows_by_eights), (16, 16.0 * rows_by_eights))
        for period in (3, 5, 8, 13, 30) if PROOF else (5, 13):
            times = []
            for how in ("auto", "off"):
                bench = TimedBench(cost, speculation=how)
                bench.engine.period = period  # type: ignore[attr-defined]
                times.append(bench.seconds(max_tokens=700))
            assert times[0] < 1.08 * times[1], f"{rows_by_eights} steps for 8 rows, {period} tokens a run: {times}"


def test_auto_stays_off_where_text_does_not_repeat() -> None:
    """The costs are known, the guesses are not good."""
    bench = TimedBench(FEW_CORES)
    bench.seconds()
    bench.engine.__class__ = FakeEngine  # the whole text counts: nothing comes again
    before = bench.n_steps_with_drafts
    bench.seconds(max_tokens=1000)
    assert bench.n_steps_with_drafts - before <= 4 * len(SIZES)


def test_a_request_has_the_last_word() -> None:
    bench = TimedBench(LINEAR)
    bench.seconds(False)
    assert bench.n_steps_with_drafts == 0
    bench.seconds(True)
    assert bench.n_steps_with_drafts > 20
    off = bench_of(speculation="off")
    with pytest.raises(InvalidRequestError, match="speculate=True"):
        off.request(LOOP, speculate=True)
    hybrid = Bench(loader=fake_loader(hybrid=True), speculation="auto").load()
    with pytest.raises(UnsupportedFeatureError, match="speculate"):
        hybrid.request(LOOP, speculate=True)


def test_a_model_that_cannot_take_tokens_back_drafts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench("abc " * 30, loader=fake_loader("abc " * 30, hybrid=True), speculation="on").load()
    (sink,) = answers(bench, "go", max_tokens=None, ignore_eos=False)
    assert sink.text == "abc " * 30
    assert metrics_of(bench.service).drafted_tokens == 0
    assert "cannot take tokens back" in caplog.text


def test_off_costs_nothing() -> None:
    """No speculation, no drafter, no rows of logits for drafts."""
    bench = bench_of(speculation="off")
    bench.ask(LOOP)
    bench.step(3)
    assert bench.scheduler.speculation is None
    assert bench.scheduler.running[0].drafter is None
    assert bench.engine.limits.n_outputs == bench.engine.limits.n_seq
    assert outputs_of(ModelConfig(model="x", n_parallel=3)) == 3
    assert outputs_of(ModelConfig(model="x", n_parallel=3, speculation="auto")) == 3 + MOST_DRAFTS


def test_auto_without_hope_asks_no_index() -> None:
    bench = TimedBench(LINEAR)
    bench.seconds()
    bench.ask(LOOP, max_tokens=30, ignore_eos=True)
    bench.step(20)
    assert bench.scheduler.running[0].drafter._index is None


def test_drafts_are_counted() -> None:
    bench = bench_of(n_parallel=2)
    sinks = answers(bench, *[f"{LOOP} {i}" for i in range(4)])
    metrics = metrics_of(bench.service)
    rejected = metrics.drafted_tokens - metrics.accepted_drafts
    assert metrics.rows + rejected == bench.engine.n_rows
    assert metrics.decode_tokens == metrics.completion_tokens - len(sinks)
    assert metrics.inter_token.count == metrics.completion_tokens - len(sinks)
    assert metrics.acceptance == metrics.accepted_drafts / metrics.drafted_tokens
    assert metrics_of(bench_of().service).acceptance is None


def test_limits_of_several_sequences_are_kept() -> None:
    """Never more outputs than the engine has room for, whoever drafts."""
    limits = fake_limits(ModelConfig(model="x", n_parallel=20, speculation="on"))
    speculation = Speculation.of(limits, "on")
    assert speculation is not None
    bench = bench_of(n_parallel=20, n_ctx=512, n_kv_cells=8192)
    sinks = answers(bench, *[f"{LOOP} {i}" for i in range(24)])
    assert all(sink.terminal.usage.completion_tokens == 80 for sink in sinks)
