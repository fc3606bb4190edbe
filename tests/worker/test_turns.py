"""Whose batch is next, when generations use different adapters: nobody starves, and nobody has to ask twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llama_worker._identity import BASE, KVIdentity
from llama_worker._pace import Pace
from llama_worker._turns import MOST_STEPS, Turns
from llama_worker.testing import fake_loader
from tests.worker.bench import Bench

SETS = [BASE, *(KVIdentity.of([(digest, 1.0)]) for digest in "abcdefg")]


class Runs:
    """All that Turns looks at of a generation."""

    def __init__(self, kv: KVIdentity) -> None:
        self.kv = kv


def steps(turns: Turns, running: list[Any], n: int, milliseconds: float = 1.0) -> list[KVIdentity]:
    """Whose batch each of `n` steps was."""
    chosen = []
    for _ in range(n):
        members = turns.members(running)
        assert members
        assert {member.kv for member in members} == {members[0].kv}, "one batch, one set"
        assert list(members) == [g for g in running if g.kv == members[0].kv], "the whole set, in its order"
        chosen.append(members[0].kv)
        turns.spent(milliseconds)
        turns.served(members[0].kv, running)
    return chosen


def test_without_different_adapters_everybody_is_in_every_batch():
    running: list[Any] = [Runs(SETS[1]) for _ in range(4)]
    assert Turns(Pace(100.0)).members(running) is running
    assert Turns(Pace(100.0)).members([]) == []


@pytest.mark.parametrize("milliseconds", [0.0, 1.0, 30.0, 500.0])
def test_sets_take_turns_of_equal_length(milliseconds: float):
    turns = Turns(Pace(100.0))
    running: list[Any] = [Runs(kv) for kv in [*SETS, SETS[0], SETS[0], SETS[3]]]
    length = MOST_STEPS if milliseconds * MOST_STEPS <= 100 else max(1, -(-100 // int(milliseconds)))
    chosen = steps(turns, running, 3 * length * len(SETS), milliseconds)
    assert set(Counter(chosen).values()) == {3 * length}
    for start in range(0, len(chosen), length):
        assert len(set(chosen[start : start + length])) == 1, "changing sets costs time"


def test_a_stream_of_ever_new_sets_starves_nobody():
    """A newcomer waits behind those that are there, however many come."""
    turns = Turns(Pace(100.0))
    old: Any = Runs(SETS[1])
    since_old = 0
    for i in range(300):
        newcomers: list[Any] = [Runs(KVIdentity.of([("new", i + j + 1.0)])) for j in range(3)]
        chosen = steps(turns, [*newcomers, old], MOST_STEPS)
        since_old = 0 if SETS[1] in chosen else since_old + 1
        assert since_old <= 4


def test_who_has_his_turn_keeps_it_while_a_batch_is_planned_again():
    turns = Turns(Pace(100.0))
    running: list[Any] = [Runs(kv) for kv in SETS]
    first = turns.members(running)
    assert [turns.members(running) for _ in range(5)] == [first] * 5


def test_a_set_that_is_gone_leaves_its_turn_to_the_next():
    turns = Turns(Pace(100.0))
    running: list[Any] = [Runs(kv) for kv in SETS]
    (now,) = set(steps(turns, running, 3))
    rest = [g for g in running if g.kv != now]
    assert now not in steps(turns, rest, 2 * MOST_STEPS * len(rest))


# --- on a bench


def opened(**config: Any) -> Bench:
    return Bench(loader=fake_loader(), lora_paths={name: f"fake://{name}" for name in "abc"}, **config).load()


def load(bench: Bench) -> Bench:
    """Benches share no engine: `seen` is not told."""
    assert bench.service.loaded is not None
    bench.engines = [bench.service.loaded.engine]  # type: ignore[list-item]
    return bench


def test_everybody_gets_what_he_would_get_alone():
    bench = load(opened(n_ctx=8192, n_parallel=8))
    asked = [(f"question {i}", {"loras": loras}) for i, loras in enumerate([(), "a", "b", {"a": 0.5}, ["a", "b"], ()])]
    sinks = [bench.ask(prompt, max_tokens=40, **how)[0] for prompt, how in asked]
    bench.settle(*sinks)
    for (prompt, how), sink in zip(asked, sinks, strict=True):
        alone = load(opened(n_ctx=8192, n_parallel=1))
        expected, _ = alone.ask(prompt, max_tokens=40, **how)
        alone.settle(expected)
        assert sink.text == expected.text
    texts = {sink.text for sink in sinks}
    assert len(texts) == len(sinks)


def test_a_long_prompt_of_one_set_does_not_stop_the_words_of_another():
    """With somebody speaking, prompts are prefilled in chunks, whoever's adapters they use."""
    bench = load(opened(n_ctx=16384, n_parallel=4, n_ubatch=32))
    talker, _ = bench.ask("hello", max_tokens=400, ignore_eos=True, loras="a")
    bench.step(3)
    bench.ask("y" * 8000, max_tokens=4, loras="b")
    before = len(talker.events)
    bench.step(4 * MOST_STEPS)
    assert len(talker.events) >= before + 2 * MOST_STEPS - 2


def test_many_short_requests_of_one_set_do_not_starve_another():
    bench = load(opened(n_ctx=8192, n_parallel=3))
    lonely, _ = bench.ask("z" * 400, max_tokens=60, ignore_eos=True, loras="c")
    sinks = [bench.ask(f"{i}", max_tokens=8, ignore_eos=True, loras="a")[0] for i in range(40)]
    bench.settle(lonely)
    assert not all(sink.is_answered for sink in sinks), "it would have come last anyhow"
    bench.settle(*sinks)


def test_out_of_cells_the_sets_still_all_finish():
    """Whatever is evicted, preempted or halved, a batch is of one set."""
    bench = load(opened(n_ctx=600, n_kv_cells=1024, n_parallel=6, n_ubatch=64))
    sets: list[Any] = [(), "a", "b", "c", {"a": 0.5}, ["a", "c"]]
    sinks = [bench.ask(f"{i} " + "w" * 250, max_tokens=120, ignore_eos=True, loras=sets[i % 6])[0] for i in range(18)]
    bench.settle(*sinks, most=20_000)
    assert {sink.terminal.kind for sink in sinks if hasattr(sink.terminal, "kind")} <= {"finished"}
    assert all(len(sink.text) for sink in sinks)
