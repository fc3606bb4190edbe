"""Checkpoints at work on the fake engine, step by step: right texts, whatever fails, is cancelled or gets evicted.

The fake's next token depends on all that its cells *and* its state have seen, so a state that is put over the wrong
tokens, or lost, gives another text.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import lru_cache

import pytest

from llama_worker import Finished, Message
from llama_worker._engine.base import DecodeStatus, StateError
from llama_worker._identity import BASE
from llama_worker._snapshots import cache_metrics_of
from llama_worker.testing import FakeEngine, Fault, fake_loader
from tests.worker.bench import Bench, ListSink

HISTORY = "a long history of what was said " * 8
ROUNDS = 400 if os.environ.get("LLAMA_WORKER_PROOF") else 40


def opened(kind: str, *, faults: list[Fault] | None = None, **config: object) -> Bench:
    """A bench over a fake that trims ("plain"), goes back to checkpoints ("hybrid"), or trims what was never saved."""
    engines: list[FakeEngine] = []

    def seen(engine: FakeEngine) -> None:
        engines.append(engine)
        if kind == "window":
            engine.limits = replace(engine.limits, can_trim_restored=False)

    loader = fake_loader(hybrid=kind == "hybrid", faults=faults or [], seen=seen)
    bench = Bench(loader=loader, **{"n_ctx": 8192, "n_parallel": 3, **config}).load()
    bench.engines = engines
    return bench


def hybrid(*, faults: list[Fault] | None = None, **config: object) -> Bench:
    return opened("hybrid", faults=faults, **config)


def turn(question: str, *answers: str, system: str = "you are a tool " * 10) -> list[Message]:
    """A conversation whose replies come back as `answers`, and end with `question`."""
    messages = [Message(role="system", content=system), Message(role="user", content=HISTORY)]
    for answer in answers:
        messages += [Message(role="assistant", content=answer), Message(role="user", content=question)]
    return messages


@lru_cache(maxsize=512)
def _alone(key: tuple[tuple[str, str], ...]) -> str:
    bench = Bench(n_ctx=8192, n_parallel=1).load()
    sink, _ = bench.ask([Message(role=role, content=content) for role, content in key])  # type: ignore[arg-type]
    bench.settle(sink)
    return sink.text


def alone(messages: list[Message]) -> str:
    """The text that a fresh engine that can trim gives to `messages`."""
    return _alone(tuple((message.role, message.content) for message in messages))


def test_a_reply_that_comes_back_in_another_form_costs_its_own_tokens_only():
    bench = hybrid()
    first, _ = bench.ask(turn("?"))
    bench.settle(first)
    before = bench.engine.n_rows
    again = turn("and now?", "in other words")
    second, _ = bench.ask(again)
    bench.settle(second)
    usage = second.terminal.usage
    assert bench.engine.n_rows - before < 120 + usage.completion_tokens
    assert usage.cached_tokens > len(HISTORY)
    assert second.text == alone(again)


def test_metrics_tell_what_checkpoints_were_good_for():
    bench = hybrid()
    first, _ = bench.ask(turn("?"))
    bench.settle(first)
    held = cache_metrics_of(bench.service)
    assert held.checkpoints >= 2
    assert held.checkpoint_bytes > 0
    assert (held.checkpoint_hits, held.restored_tokens, held.state_failures) == (0, 0, 0)
    second, _ = bench.ask(turn("and now?", "in other words"))
    bench.settle(second)
    after = cache_metrics_of(bench.service)
    assert after.checkpoint_hits == 1
    assert after.restored_tokens == after.reused_tokens == second.terminal.usage.cached_tokens


def test_a_prompt_shared_with_one_that_is_being_computed_waits_for_its_checkpoint_and_no_longer():
    bench = hybrid(n_ubatch=32)
    asked = [turn(f"{i}", f"{i}", system="s" * 600) for i in range(3)]
    sinks = [bench.ask(messages)[0] for messages in asked]
    bench.step(25)
    assert len(bench.scheduler.running) == 3, "the system prompt is computed, the rest of the first is not"
    assert not bench.scheduler.running[0].is_decoding
    bench.settle(*sinks)
    assert [sink.terminal.usage.cached_tokens >= 600 for sink in sinks] == [False, True, True]
    assert [sink.text for sink in sinks] == [alone(messages) for messages in asked]


@pytest.mark.parametrize("call", ["seq_save", "seq_restore"])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("how", [StateError("no room"), MemoryError("no memory is left")], ids=["state", "memory"])
def test_a_state_that_cannot_be_saved_or_restored_costs_time_and_no_request(call: str, nth: int, how: Exception):
    bench = hybrid(faults=[Fault(call, how, nth)])  # type: ignore[arg-type]
    asked = [turn("?"), turn("and?", "one"), turn("but?", "two"), turn("so?", "one", "three"), turn("?")]
    for messages in asked:
        sink, _ = bench.ask(messages)
        bench.settle(sink)
        assert isinstance(sink.terminal, Finished)
        assert sink.text == alone(messages)
        assert sink.terminal.usage.cached_tokens <= sink.terminal.usage.prompt_tokens
    assert cache_metrics_of(bench.service).state_failures == 1


def test_every_restore_may_fail():
    faults = [Fault("seq_restore", StateError("never"), nth) for nth in range(1, 100)]
    bench = hybrid(faults=faults)
    asked = [turn(f"{i}", f"{i}") for i in range(6)]
    sinks = [bench.ask(messages)[0] for messages in asked]
    bench.settle(*sinks)
    assert [sink.text for sink in sinks] == [alone(messages) for messages in asked]


def test_a_budget_bounds_what_is_held():
    bench = hybrid(cache_ram=0)
    first, _ = bench.ask(turn("?"))
    bench.settle(first)
    assert cache_metrics_of(bench.service).checkpoints == 0
    bench = hybrid(n_parallel=4, cache_ram=1)
    set_budget(bench, 5000)
    for i in range(12):
        sink, _ = bench.ask(turn(f"{i}", f"{i}"))
        while not sink.is_answered:
            bench.step()
            assert held(bench) <= 5000
    assert cache_metrics_of(bench.service).checkpoints_dropped > 0


def set_budget(bench: Bench, budget: int) -> None:
    cache = bench.scheduler.cache
    cache.checkpoints.budget = cache.tier._budget = budget


def held(bench: Bench) -> int:
    """Bytes of saved states."""
    cache = cache_metrics_of(bench.service)
    return cache.checkpoint_bytes + cache.saved_bytes


@pytest.mark.parametrize("cancelled", [True, False])
def test_an_abort_costs_what_was_computed_since_the_last_checkpoint(cancelled: bool):
    """Whether the request was cancelled and is asked again, or somebody raised the flag for another."""
    bench = hybrid(faults=[Fault("decode", DecodeStatus.ABORTED, 3)], n_ubatch=512)
    sink, cancel = bench.ask(turn("?"))
    bench.step(2)
    assert bench.engine.n_rows > 300
    if cancelled:
        cancel.cancel()
    bench.step()
    before = bench.engine.n_rows
    if cancelled:
        assert sink.is_answered
        sink, _ = bench.ask(turn("?"))
    bench.settle(sink)
    assert bench.engine.n_rows - before < 300
    assert sink.text == alone(turn("?"))


@pytest.mark.parametrize("status", [DecodeStatus.ABORTED, DecodeStatus.COMPUTE_FAILED])
def test_who_idles_while_a_decode_of_others_breaks_off_goes_back_to_a_checkpoint(status: DecodeStatus):
    """The decode of several that breaks off costs every sequence its state."""
    bench = hybrid()
    first, _ = bench.ask(turn("?"))
    bench.settle(first)
    slot = max(bench.scheduler.cache.slots, key=lambda slot: slot.n)
    held, checkpoint = slot.n, slot.checkpoints[-1].length
    break_off(bench, status)
    sinks = [bench.ask(name * 50)[0] for name in "ab"]
    bench.step()
    assert (slot.n, bench.engine.seq_end(slot.seq)) == (checkpoint, checkpoint) != (held, held)
    bench.settle(*sinks)
    again, _ = bench.ask(turn("?"))
    bench.settle(again)
    assert again.terminal.usage.cached_tokens >= checkpoint
    assert again.text == alone(turn("?"))


def test_who_runs_with_other_adapters_while_a_decode_breaks_off_goes_on_rightly():
    """It takes turns with those whose decode breaks off, and has no part in it."""
    alone_with_it, bench = (hybrid(lora_paths={"a": "fake://a"}) for _ in range(2))
    expected, _ = alone_with_it.ask(turn("?"), loras="a", **LONG)
    alone_with_it.settle(expected)
    running, _ = bench.ask(turn("?"), loras="a", **LONG)
    sinks = [bench.ask(name * 50, **LONG)[0] for name in "ab"]
    bench.step(20)
    while bench.engine.kv == BASE:
        bench.step()
    while bench.engine.kv != BASE:
        bench.step()
    assert all(generation.is_decoding for generation in bench.scheduler.running)
    break_off(bench, DecodeStatus.ABORTED)
    slot = bench.scheduler.running[0].slot
    held = slot.n
    bench.step()
    assert bench.engine.kv == BASE, "the decode was of the others"
    assert 0 < slot.n < held
    bench.settle(running, *sinks)
    assert running.text == expected.text
    assert [sink.text for sink in sinks] == [alone_text(name * 50) for name in "ab"]


LONG = {"max_tokens": 120, "ignore_eos": True}


def break_off(bench: Bench, status: DecodeStatus) -> None:
    """The next decode."""
    bench.engine.faults.append(Fault("decode", status, bench.engine.calls.count("decode") + 1))


def alone_text(prompt: str) -> str:
    bench = Bench(n_ctx=8192, n_parallel=1).load()
    sink, _ = bench.ask(prompt, **LONG)
    bench.settle(sink)
    return sink.text


@pytest.mark.parametrize("kind", ["plain", "window", "hybrid"])
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_storm_of_turns_cancels_evictions_and_failures(kind: str, seed: int):
    """Too few cells and slots for all: books and engine agree after each step, and whoever finishes is right."""
    rng = random.Random(seed)
    faults = [
        Fault(rng.choice(["seq_save", "seq_restore"]), StateError("now and then"), rng.randrange(1, 30))  # type: ignore[arg-type]
        for _ in range(rng.randrange(6))
    ]
    faults += [Fault("decode", DecodeStatus.ABORTED, rng.randrange(1, 60)) for _ in range(rng.randrange(4))]
    n_cells = rng.choice([600, 900, 2000])
    bench = opened(kind, faults=faults, n_kv_cells=n_cells, n_ctx=600, n_ubatch=rng.choice([32, 64, 512]))
    budget = rng.choice([0, 4000, 10**6])
    set_budget(bench, budget)
    if rng.random() < 0.3 and n_cells > 600:
        bench.engine.hidden_cells = 200
    systems = ["s" * 90, "t" * 150, ""]
    asked: list[tuple[list[Message], ListSink]] = []
    for _ in range(rng.randrange(4, 16)):
        answers = [rng.choice(["one", "two", "three"]) for _ in range(rng.randrange(3))]
        messages = turn(rng.choice(["?", "and?", "so"]), *answers, system=rng.choice(systems) or "x")
        sink, cancel = bench.ask(messages, max_tokens=16)
        asked.append((messages, sink))
        bench.step(rng.randrange(12))
        if rng.random() < 0.3:
            cancel.cancel()
        assert held(bench) <= budget
    bench.settle(*[sink for _, sink in asked])
    for messages, sink in asked:
        assert isinstance(sink.terminal, Finished), sink.terminal
        if sink.terminal.reason != "cancelled":
            assert sink.text == alone(messages)
