"""What was computed with one set of adapters is never used with another: slots, sharing, checkpoints, RAM, replies."""

from __future__ import annotations

import os
import random
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from llama_worker import Finished, Message
from llama_worker._engine.state import kv_mark
from llama_worker._identity import BASE, KVIdentity
from llama_worker._prefix_cache import PrefixCache
from llama_worker._seq_ops import Save
from llama_worker._slot import Slot
from llama_worker._snapshots import cache_metrics_of
from llama_worker._tokens import TokenIds
from llama_worker.testing import FakeEngine, fake_loader
from tests.worker.bench import Bench, ListSink

ROUNDS = 400 if os.environ.get("LLAMA_WORKER_PROOF") else 40
LONG = "a long prompt that everybody has in common " * 10
SETS: list[Any] = [(), "a", "b", {"a": 0.5}, {"a": 1.0, "b": -1.0}]
A = KVIdentity.of([("a", 1.0)])


def opened(*, hybrid: bool = False, **config: object) -> Bench:
    engines: list[FakeEngine] = []
    paths = {name: f"fake://{name}" for name in "ab"}
    loader = fake_loader(hybrid=hybrid, seen=engines.append)
    bench = Bench(loader=loader, lora_paths=paths, **{"n_ctx": 8192, "n_parallel": 3, **config}).load()
    bench.engines = engines
    return bench


def answered(bench: Bench, prompt: str | list[Message], loras: Any = (), **params: Any) -> ListSink:
    sink, _ = bench.ask(prompt, loras=loras, **params)
    bench.settle(sink)
    return sink


@lru_cache(maxsize=512)
def alone(prompt: str, which: int) -> str:
    return answered(opened(n_parallel=1), prompt, SETS[which]).text


# --- slots


@pytest.mark.parametrize("hybrid", [False, True], ids=["trims", "checkpoints"])
def test_each_set_starts_from_its_own_tokens_only(hybrid: bool):
    bench = opened(hybrid=hybrid, n_parallel=8)
    for which, loras in enumerate(SETS):
        first = answered(bench, LONG + "one", loras)
        assert first.terminal.usage.cached_tokens == 0, loras
        assert first.text == alone(LONG + "one", which)
    for which, loras in enumerate(SETS):
        again = answered(bench, LONG + "one", loras)
        assert again.terminal.usage.cached_tokens > 300, loras
        assert again.text == alone(LONG + "one", which)


def test_the_same_set_said_in_another_way_is_the_same():
    bench = opened(n_parallel=1)
    answered(bench, LONG, {"a": 1.0, "b": 0.0})
    for same in ("a", ["a"], {"a": 1}, (("a", 1.0),), {"b": 0, "a": 1.0 + 1e-12}):
        assert answered(bench, LONG, same).terminal.usage.cached_tokens > 300
    answered(bench, LONG, {"a": 0.0})
    assert answered(bench, LONG).terminal.usage.cached_tokens > 300, "with the scale 0 it is the model itself"


def test_who_computes_a_prefix_is_waited_for_by_the_same_set_only():
    bench = opened(n_parallel=4, n_ubatch=32)
    sinks = [bench.ask(LONG + f" agent {i}", loras=loras)[0] for i, loras in enumerate(["a", "b", "a", "b"])]
    bench.step(2)
    assert len(bench.scheduler.running) == 2
    bench.settle(*sinks)
    assert [sink.terminal.usage.cached_tokens > 300 for sink in sinks] == [False, False, True, True]
    expected = [alone(LONG + f" agent {i}", which) for i, which in enumerate([1, 2, 1, 2])]
    assert [sink.text for sink in sinks] == expected


def test_a_slot_that_was_another_set_s_is_one_s_own_from_then_on():
    bench = opened(n_parallel=1)
    for which in (0, 1, 0, 2, 1, 1):
        assert answered(bench, LONG, SETS[which]).text == alone(LONG, which)


# --- RAM


def test_what_was_saved_comes_back_to_its_own_set_only():
    bench = opened(n_parallel=1)
    answered(bench, LONG + "one", "a")
    answered(bench, "something else " * 40)
    assert cache_metrics_of(bench.service).saved == 1
    for loras in ((), "b", {"a": 0.5}):
        assert answered(bench, LONG + "two", loras).terminal.usage.cached_tokens == 0
    assert cache_metrics_of(bench.service).saved_hits == 0
    again = answered(bench, LONG + "two", "a")
    assert (again.terminal.usage.cached_tokens > 300, again.text) == (True, alone(LONG + "two", 1))
    assert cache_metrics_of(bench.service).saved_hits == 1


def test_the_same_tokens_are_saved_once_for_each_set():
    books = PrefixCache(
        n_seq=1, n_cells=1024, can_trim=True, can_share=True, can_save=True, can_trim_restored=True, budget=10**6
    )
    tokens, other = np.arange(200, dtype=np.int32), np.arange(500, 700, dtype=np.int32)
    for kv in (BASE, A, BASE, A):
        for prompt in (tokens, other):
            loan = books.lend(prompt, kv=kv)
            for op in loan.ops:
                if isinstance(op, Save):
                    books.keep_saved(op, np.zeros(100, np.uint8))
            books.extend(loan.slot, prompt[loan.slot.n :])
            books.give_back(loan.slot)
            books.check()
    held = {(entry.kv, int(entry.tokens[0])) for entry in books.tier.entries}
    assert len(held) == len(books.tier.entries) >= 3
    assert books.tier.find(tokens, A)[1] == 199
    assert books.tier.find(tokens, KVIdentity.of([("a", 0.5)])) == (None, 0)


def test_a_state_of_other_adapters_is_not_restored_even_if_the_books_err():
    """The label says what it is of; its tokens are decoded instead."""
    bench = opened(n_parallel=1)
    answered(bench, LONG + "one", "a")
    answered(bench, "something else " * 40)
    (entry,) = bench.scheduler.cache.tier.entries
    assert kv_mark(entry.state) == entry.kv.mark != BASE.mark
    entry.kv = BASE
    sink = answered(bench, LONG + "two")
    assert (sink.terminal.usage.cached_tokens, sink.text) == (0, alone(LONG + "two", 0))
    assert cache_metrics_of(bench.service).state_failures
    assert kv_mark(b"short") == b""


# --- replies


def test_a_reply_keeps_its_ids_for_the_set_that_gave_it():
    """Another set may have given the same text with other ids, which are what its cells hold."""
    bench = opened()
    turn = [Message(role="user", content="hello " * 20)]
    first = answered(bench, turn, "a")
    view = bench.published.view(0)
    assert view is not None
    rendered = view.rendered([*turn, Message(role="assistant", content=first.text)], add_generation_prompt=False)
    job = bench.request(turn, loras="a").job
    assert view.replies.find(rendered, job.kv) is not None
    assert view.replies.find(rendered, BASE) is None


# --- all of it, at random


@pytest.mark.parametrize("hybrid", [False, True], ids=["trims", "checkpoints"])
def test_whatever_comes_each_gets_the_text_of_its_own_set(hybrid: bool):
    rng = random.Random(7)
    bench = opened(hybrid=hybrid, n_parallel=3, n_ctx=1200, n_kv_cells=1536, n_ubatch=64, cache_ram=1)
    for _ in range(ROUNDS):
        asked = [(LONG[: rng.randrange(1, 430)] + rng.choice("xyz"), rng.randrange(len(SETS))) for _ in range(4)]
        sinks = [bench.ask(prompt, loras=SETS[which])[0] for prompt, which in asked]
        bench.settle(*sinks)
        for sink, (prompt, which) in zip(sinks, asked, strict=True):
            assert isinstance(sink.terminal, Finished)
            assert sink.text == alone(prompt, which)
    assert cache_metrics_of(bench.service).reused_tokens > 0


# --- and it would be noticed if it were otherwise


def blind(cache: PrefixCache) -> None:
    """A cache that looks at tokens alone."""

    def match(prompt: TokenIds, session: str | None = None, *, kv: KVIdentity = BASE) -> tuple[Slot | None, int]:
        usable = [(cache.reach.usable(slot, prompt), -slot.seq, slot) for slot in cache.slots]
        length, _, slot = max(usable)
        return (slot, length) if length else (None, 0)

    cache.match = match  # type: ignore[method-assign]


@pytest.mark.parametrize("hybrid", [False, True], ids=["trims", "checkpoints"])
def test_a_cache_that_ignored_the_set_would_be_caught_by_the_engine(hybrid: bool):
    bench = opened(hybrid=hybrid)
    blind(bench.scheduler.cache)
    answered(bench, LONG + "one", "a")
    if hybrid:  # its checkpoint says what it is of
        assert answered(bench, LONG + "one").text == alone(LONG + "one", 0)
        assert cache_metrics_of(bench.service).state_failures
        return
    with pytest.raises((ValueError, AssertionError), match=r"other adapters|others' cells"):
        answered(bench, LONG + "one")
