"""A worker with a folder: what leaves RAM comes back, after a restart too, and no disk ever costs a request."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from llama_worker import ConfigError, Message, ModelConfig, WorkerConfig
from llama_worker._commands import Export
from llama_worker._disk import LEAST_LINE
from llama_worker._disk_line import line
from llama_worker._disk_threads import begin
from llama_worker._disk_tier import FRESH, PATIENCE, DiskTier
from llama_worker._engine.base import StateError, TokenIds
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._identity import BASE, KVIdentity
from llama_worker._prefix_cache import PrefixCache
from llama_worker._shelved import Shelved
from llama_worker._snapshots import cache_metrics_of
from llama_worker.testing import Fault, fake_loader, fake_worker
from tests.worker.bench import Bench
from tests.worker.disk_talker import prompt, talk
from tests.worker.test_cache_transfer import ask, conversation, imported, told
from tests.worker.test_disk_store import full_disk
from tests.worker.test_going_back import alone, opened
from tests.worker.test_lora_cache import LONG, SETS, answered
from tests.worker.test_lora_cache import alone as with_set
from tests.worker.test_lora_cache import opened as with_loras
from tests.worker.test_prefix_cache import ids, run_of
from tests.worker.waiting import wait_until

PROOF = bool(os.environ.get("LLAMA_WORKER_PROOF"))
KINDS = ["plain", "window", "hybrid"]
N = len(conversation(0)[0].content)


def with_disk(kind: str, folder: Path, **config: Any) -> Bench:
    """A worker with one slot and no RAM beside it: who comes back comes back from the disk."""
    return opened(kind, **{"n_parallel": 1, "cache_ram": 0, "cache_dir": str(folder), **config})


def settled(bench: Bench) -> Any:
    """The metrics, when everything is written that is to be."""
    begin(lambda: None).result(60)
    return cache_metrics_of(bench.service)


def next_turn(history: list[Message]) -> list[Message]:
    return [*history, Message(role="assistant", content=alone(history)), Message(role="user", content="and?")]


# --- there and back


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_what_ram_does_not_keep_comes_back_from_the_disk(kind: str, tmp_path: Path):
    bench = with_disk(kind, tmp_path)
    for i in range(4):
        ask(bench, conversation(i))
        assert settled(bench).disk == i
    for i in range(4):
        sink = ask(bench, next_turn(conversation(i)))
        settled(bench)
        assert sink.text == alone(next_turn(conversation(i)))
        assert sink.terminal.usage.cached_tokens >= N
    cache = settled(bench)
    assert (cache.disk_hits, cache.disk_failures, cache.disk_dropped) == (4, 0, 0)
    assert cache.restored_tokens >= 4 * N
    assert cache.disk_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    bench.shut_down()


@pytest.mark.parametrize("kind", KINDS)
def test_what_ram_has_no_more_room_for_goes_to_the_disk(kind: str, tmp_path: Path):
    """With its checkpoints, where it has any."""
    bench = with_disk(kind, tmp_path, cache_ram=1)
    assert bench.service.loaded is not None
    bench.scheduler.cache.tier._budget = bench.scheduler.cache.checkpoints.budget = 20_000
    histories = [conversation(i) for i in range(12)]
    for history in histories:
        ask(bench, history)
    assert settled(bench).disk >= 4
    for history in histories:
        sink = ask(bench, next_turn(history))
        settled(bench)
        assert sink.text == alone(next_turn(history))
        assert sink.terminal.usage.cached_tokens >= N
    assert settled(bench).disk_hits >= 4
    bench.shut_down()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_ram", [0, 512])
def test_a_restart_starts_warm(kind: str, cache_ram: int, tmp_path: Path):
    """The end of a worker writes what its slots and its RAM hold."""
    settings = {"n_parallel": 2, "cache_ram": cache_ram}
    bench = with_disk(kind, tmp_path, **settings)
    histories = [conversation(i) for i in range(2 + 3 * bool(cache_ram))]
    for history in histories:
        ask(bench, history)
    bench.shut_down()
    bench = with_disk(kind, tmp_path, **settings)
    for history in histories:
        sink = ask(bench, next_turn(history))
        assert sink.text == alone(next_turn(history))
        assert sink.terminal.usage.cached_tokens >= N
    assert settled(bench).disk_hits == len(histories)
    bench.shut_down()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_back_to_the_same_model_starts_warm(kind: str, tmp_path: Path):
    bench = with_disk(kind, tmp_path)
    ask(bench, conversation(0))
    for model in ("fake://other", "fake://model"):
        reload = bench.reload(model=model)
        bench.settle(reload.answer)
        assert reload.answer.exception() is None
        hits = settled(bench).disk_hits
        sink = ask(bench, next_turn(conversation(0)))
        assert (settled(bench).disk_hits - hits == 1) is (model == "fake://model")
    assert sink.terminal.usage.cached_tokens >= N
    bench.shut_down()


def test_an_idle_model_that_was_unloaded_comes_back_warm(tmp_path: Path):
    bench = with_disk("plain", tmp_path)
    bench.service.keep_alive = 60.0
    ask(bench, conversation(0))
    bench.step()
    bench.now += 61
    bench.step()
    assert bench.service.loaded is None
    sink = ask(bench, next_turn(conversation(0)))
    assert sink.terminal.usage.cached_tokens >= N
    bench.shut_down()


def test_who_shares_the_folder_finds_what_others_wrote(tmp_path: Path):
    one, two = with_disk("plain", tmp_path), with_disk("plain", tmp_path)
    ask(two, conversation(7))
    for i in range(2):
        ask(one, conversation(i))
    settled(one)
    two.now += FRESH
    ask(two, conversation(8))  # whose prompt makes it look
    settled(two)
    sink = ask(two, next_turn(conversation(0)))
    assert (sink.text, settled(two).disk_hits) == (alone(next_turn(conversation(0))), 1)
    one.shut_down()
    two.shut_down()


def test_what_is_still_in_the_line_is_found_there(tmp_path: Path):
    """A disk that takes its time to write keeps nobody from what is in RAM all the while."""
    bench, held_up = with_disk("plain", tmp_path), Event()
    ask(bench, conversation(0))
    begin(held_up.wait)
    try:
        ask(bench, conversation(1))
        sink = ask(bench, next_turn(conversation(0)))
        cache = cache_metrics_of(bench.service)
        assert (sink.text, cache.disk_hits, cache.disk) == (alone(next_turn(conversation(0))), 1, 0)
    finally:
        held_up.set()
    bench.shut_down()


def test_what_comes_faster_than_the_disk_takes_it_is_dropped(tmp_path: Path):
    bench, held_up = with_disk("plain", tmp_path), Event()
    assert bench.service.loaded is not None
    disk = bench.service.loaded.disk
    assert disk is not None
    ask(bench, conversation(0))
    begin(held_up.wait)
    try:
        disk._line = 10_000
        for i in range(1, 12):
            assert ask(bench, conversation(i)).text == alone(conversation(i))
        assert disk.room >= 0
    finally:
        held_up.set()
    cache = settled(bench)
    assert cache.disk_dropped > 0
    assert cache.disk + cache.disk_dropped == 11
    bench.shut_down()


@contextmanager
def busy_disk() -> Iterator[None]:
    """Nothing is written meanwhile."""
    held_up = Event()
    begin(held_up.wait)
    try:
        yield
    finally:
        held_up.set()


def reload(bench: Bench, **config: Any) -> None:
    command = bench.reload(**config)
    bench.settle(command.answer)
    assert command.answer.exception() is None


@pytest.mark.parametrize("how", ["unloaded", "reloaded", "closed"])
def test_the_end_waits_for_what_every_model_has_to_write(how: str, tmp_path: Path):
    """Its memory is free for others before."""
    keep_alive = 0.01 if how == "unloaded" else None
    worker = fake_worker("hi", cache_dir=str(tmp_path), worker_config=WorkerConfig(keep_alive=keep_alive))
    with busy_disk():
        worker.generate(conversation(0))
        if how == "unloaded":
            wait_until(lambda: worker.status().state == "unloaded")
        elif how == "reloaded":
            worker.reload(model="fake://other")
        closing = Thread(target=worker.close)
        closing.start()
        worker._service.freed.result(60)
        assert worker._service.loaded is None
        closing.join(0.2)
        assert closing.is_alive()
        assert list(tmp_path.iterdir()) == []
    closing.join()
    assert len(list(tmp_path.iterdir())) == 1


def test_nobody_waits_for_the_disk_while_others_are_writing(tmp_path: Path):
    """Neither the first request after a reload, nor that of another worker with another folder."""
    bench = with_disk("plain", tmp_path / "one")
    ask(bench, conversation(0))
    with busy_disk():
        reload(bench, model="fake://other")
        other = with_disk("plain", tmp_path / "two")
        for each in (bench, other):
            assert ask(each, conversation(1)).text == alone(conversation(1))
            assert each.service.loaded is not None
            assert not each.service.loaded.disk.is_opening
    bench.shut_down()
    other.shut_down()


def test_the_line_is_one_for_the_process_and_has_each_file_once(tmp_path: Path):
    bench = with_disk("plain", tmp_path)
    with busy_disk():
        for i in range(6):
            ask(bench, conversation(0))
            reload(bench, n_parallel=1 + i % 2)
        assert len(line._writing) == 1
        assert bench.service.loaded is not None
        assert bench.service.loaded.disk.room == LEAST_LINE - line._writing[0].entry.n_bytes
        sink = ask(bench, next_turn(conversation(0)))
        assert sink.terminal.usage.cached_tokens >= N
    bench.shut_down()


def test_what_two_workers_would_write_is_in_the_line_once(tmp_path: Path):
    benches = [with_disk("plain", tmp_path) for _ in range(2)]
    for bench in benches:
        ask(bench, conversation(0))
    with busy_disk():
        for bench in benches:
            ask(bench, conversation(1))
        assert len(line._writing) == 1
    for bench in benches:
        assert settled(bench).disk == 1
        bench.shut_down()


def test_several_workers_have_one_line_together(tmp_path: Path):
    benches = [with_disk("plain", tmp_path / f"{i}") for i in range(3)]
    with busy_disk():
        for bench in benches:
            assert bench.service.loaded is not None
            bench.service.loaded.disk._line = 10_000
            for i in range(6):
                ask(bench, conversation(i))
        assert line.room(10_000) >= 0
        assert len({writing.owner for writing in line._writing}) == 1
    for bench in benches:
        bench.shut_down()


def test_copies_that_come_back_from_the_disk_were_not_made_in_vain(tmp_path: Path):
    """Whether copying pays is learnt with a disk as without: a flood that nobody comes back to is copied ever less."""
    bench = with_disk("plain", tmp_path)
    thrift, chances = bench.scheduler.cache.tier.thrift, []
    for i in range(6):
        ask(bench, conversation(i))
        chances.append(thrift._chance[False])
    assert chances == sorted(chances, reverse=True)
    assert chances[0] == 1 > chances[-1]
    ask(bench, next_turn(conversation(0)))
    assert settled(bench).disk_hits == 1
    assert thrift._chance[False] > chances[-1] * (1 - 1 / 32)
    bench.shut_down()


def test_a_longer_prefix_replaces_what_it_leads_to(tmp_path: Path):
    bench = with_disk("plain", tmp_path)
    history = conversation(0)
    for _ in range(3):
        ask(bench, history)
        ask(bench, conversation(10))
        history = next_turn(history)
    assert settled(bench).disk == 2
    bench.shut_down()
    assert len(list(tmp_path.iterdir())) == 2


def test_slots_and_ram_are_searched_before_the_disk(tmp_path: Path):
    bench = with_disk("plain", tmp_path, n_parallel=2, cache_ram=512)
    for i in range(3):
        ask(bench, conversation(i))
    bench.shut_down()
    bench = with_disk("plain", tmp_path, n_parallel=2, cache_ram=512)
    for i in range(3):
        ask(bench, conversation(i))
    assert settled(bench).disk_hits == 3
    for i in range(3):
        assert ask(bench, next_turn(conversation(i))).terminal.usage.cached_tokens >= N
    assert settled(bench).disk_hits == 3
    bench.shut_down()


def test_a_little_more_than_is_held_is_not_worth_a_file(tmp_path: Path):
    """The whole file would have to be read for less than 128 tokens."""
    bench = with_disk("plain", tmp_path, n_parallel=2)
    ask(bench, [Message(role="user", content="a" * 300 + "b" * 100)])
    bench.shut_down()
    bench = with_disk("plain", tmp_path, n_parallel=2)
    ask(bench, [Message(role="user", content="a" * 300 + "c" * 300)])
    assert settled(bench).disk_hits == 1
    ask(bench, [Message(role="user", content="a" * 300 + "b" * 100)])
    assert settled(bench).disk_hits == 1
    bench.shut_down()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_right_whatever_is_evicted_cancelled_and_restarted(kind: str, tmp_path: Path):
    """Random sessions over few slots, hardly any RAM, a small disk, and a new process's worker now and then."""
    rng = random.Random(11)
    settings = {"n_parallel": 2, "n_ctx": 1500, "cache_ram": 1}
    bench, histories = with_disk(kind, tmp_path, **settings), [conversation(i) for i in range(6)]
    for step in range(300 if PROOF else 40):
        bench.scheduler.cache.tier._budget = bench.scheduler.cache.checkpoints.budget = 15_000
        i = rng.randrange(len(histories))
        sink, cancel = bench.ask(histories[i])
        if rng.random() < 0.2:
            bench.step(rng.randrange(4))
            cancel.cancel()
            bench.settle(sink)
        else:
            bench.settle(sink)
            assert sink.text == alone(histories[i])
            histories[i] = conversation(i) if len(histories[i]) > 4 else next_turn(histories[i])
        if step % 15 == 14:
            bench.shut_down()
            bench = with_disk(kind, tmp_path, **settings)
    assert settled(bench).disk_failures == 0
    bench.shut_down()


# --- whose it is


OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": "fake://other"},
    "template": {"chat_template": "{% for m in messages %}<|im_start|>user\n{{ m['content'] }}{% endfor %}"},
    "K type": {"type_k": "q8_0"},
    "V type": {"type_v": "q8_0"},
    "flash attention": {"flash_attn": "on"},
    "window": {"swa_full": False},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_anothers_is_never_used(other: str, tmp_path: Path):
    """The prompt has the very same tokens."""
    prompt = "a raw prompt is the same under every template " * 10
    for config, hits in (({}, 0), (OTHERS[other], 0), ({}, 1)):
        bench = with_disk("plain", tmp_path, **config)
        sink, _ = bench.ask(prompt)
        bench.settle(sink)
        assert settled(bench).disk_hits == hits
        bench.shut_down()


def test_what_was_computed_with_adapters_is_not_found_without(tmp_path: Path):
    some, other = KVIdentity((("a", 1.0),)), KVIdentity((("a", 0.5),))
    shelf = Shelf([stored(run_of(0, 300), kv=some)])
    assert not tier(shelf).is_awaited(wanting(run_of(0, 400)), held(0))
    assert not tier(shelf).is_awaited(wanting(run_of(0, 400), other), held(0))
    assert tier(shelf).is_awaited(wanting(run_of(0, 400), some), held(0))
    assert [tier(shelf).wants(run_of(0, 300), kv) for kv in (some, other, BASE)] == [False, True, True]


@pytest.mark.parametrize("hybrid", [False, True], ids=["trims", "checkpoints"])
def test_what_was_computed_with_adapters_comes_back_to_the_same_set_only(hybrid: bool, tmp_path: Path):
    """Also in another worker, which knows a set by what its files hold. The prompts are the same, word for word."""
    settings: dict[str, Any] = {"n_parallel": 1, "cache_ram": 0, "cache_dir": str(tmp_path)}
    bench = with_loras(hybrid=hybrid, **settings)
    for which, loras in enumerate(SETS):
        assert answered(bench, LONG, loras).text == with_set(LONG, which)
        assert settled(bench).disk_hits == 0
    bench.shut_down()
    assert len(list(tmp_path.iterdir())) == len(SETS)
    bench = with_loras(hybrid=hybrid, **settings)
    for which, loras in enumerate(SETS):
        turn = LONG + with_set(LONG, which) + " and more"
        sink = answered(bench, turn, loras)
        assert (sink.text, sink.terminal.usage.cached_tokens >= len(LONG)) == (with_set(turn, which), True)
        assert settled(bench).disk_hits == which + 1
    bench.shut_down()


def test_adapters_travel_with_an_exported_cache(tmp_path: Path):
    bench = with_loras(n_parallel=8)
    for loras in SETS:
        answered(bench, LONG, loras)
    (entries,) = told(bench, Export(epoch=1))
    other = with_loras(n_parallel=8)
    assert told(other, imported(*entries)) == [len(SETS)]
    for which, loras in enumerate(SETS):
        sink = answered(other, LONG, loras)
        assert (sink.text, sink.terminal.usage.cached_tokens) == (with_set(LONG, which), len(LONG))


# --- a disk that does not serve


def serves_on(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Everyone is answered rightly; the failures are counted, and said once."""
    for i in (1, 2, 3, 1, 2, 3):
        assert ask(bench, conversation(i)).text == alone(conversation(i))
        settled(bench)
    assert settled(bench).disk_failures > 1
    bench.shut_down()
    said = [r for r in caplog.records if r.levelno >= logging.WARNING and "cache_dir" in r.getMessage()]
    assert len(said) == 1
    assert "raw" not in said[0].getMessage()


def test_requests_go_on_with_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bench = with_disk("plain", tmp_path)
    with full_disk(1000):
        serves_on(bench, caplog)
    assert list(tmp_path.iterdir()) == []


def test_requests_go_on_with_a_file_in_the_place_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    serves_on(with_disk("plain", tmp_path / "file"), caplog)
    assert (tmp_path / "file").read_bytes() == b"", "whose it is stays as it was"


def test_requests_go_on_when_the_folder_becomes_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bench = with_disk("plain", tmp_path / "kept")
    for i in (1, 2):
        ask(bench, conversation(i))
    assert settled(bench).disk == 1
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    (tmp_path / "kept").rmdir()
    (tmp_path / "kept").touch()
    serves_on(bench, caplog)
    assert (tmp_path / "kept").read_bytes() == b""


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path):
    bench = with_disk("plain", tmp_path / "kept")
    for i in (1, 2):
        ask(bench, conversation(i))
    settled(bench)
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    (tmp_path / "kept").rmdir()
    assert ask(bench, next_turn(conversation(1))).text == alone(next_turn(conversation(1)))
    cache = settled(bench)
    assert (cache.disk_hits, cache.disk_failures) == (0, 0)
    bench.shut_down()
    assert list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_costs_its_prefill(kind: str, tmp_path: Path):
    """Every file with a flip, somewhere: in the head it is seen when the worker starts, elsewhere when it is read."""
    bench = with_disk(kind, tmp_path, n_parallel=4, cache_ram=1)
    for i in range(4):
        ask(bench, conversation(i))
    bench.shut_down()
    for path, share in zip(sorted(tmp_path.iterdir()), (0.01, 0.3, 0.6, 0.99), strict=True):
        data = bytearray(path.read_bytes())
        data[int(share * len(data))] ^= 4
        path.write_bytes(data)
    bench = with_disk(kind, tmp_path, n_parallel=4, cache_ram=1)
    for i in range(4):
        sink = ask(bench, next_turn(conversation(i)))
        assert sink.text == alone(next_turn(conversation(i)))
        assert sink.terminal.usage.cached_tokens < N
    assert (settled(bench).disk_failures, settled(bench).disk_hits) == (4, 0)
    bench.shut_down()


@pytest.mark.parametrize("call", ["seq_save", "seq_restore"])
@pytest.mark.parametrize("how", [StateError("no room"), MemoryError("no memory is left")], ids=["state", "memory"])
def test_no_request_is_lost_when_states_fail(call: str, how: Exception, tmp_path: Path):
    faults = [Fault(call, how, nth) for nth in range(1, 200)]  # type: ignore[arg-type]
    for i in (0, 1, 0, 1):
        bench = with_disk("plain", tmp_path, faults=faults)
        assert ask(bench, conversation(i)).text == alone(conversation(i))
        assert ask(bench, conversation(i + 5)).text == alone(conversation(i + 5))
        bench.shut_down()


def test_a_worker_that_died_writes_nothing_of_what_it_held(tmp_path: Path):
    """What an engine holds that broke may be anything."""
    bench = with_disk("plain", tmp_path)
    ask(bench, conversation(0))
    from llama_worker._loop import end

    end(bench.service, RuntimeError("broken"))
    assert list(tmp_path.iterdir()) == []


# --- who waits


def stored(tokens: TokenIds, **given: Any) -> Shelved:
    return Shelved(tokens=tokens, **given)


@dataclass
class Reading:
    is_done: bool = False
    entry: Entry | None = None


@dataclass
class Shelf:
    """A folder whose disk does what the test says."""

    index: list[Shelved]
    is_opening: bool = False
    readings: list[Reading] = field(default_factory=list)
    written: list[Entry] = field(default_factory=list)
    n_refreshed: int = 0

    def read(self, shelved: Any) -> Reading:
        self.readings.append(Reading())
        return self.readings[-1]

    def write(self, entry: Entry) -> None:
        self.written.append(entry)

    def refresh(self) -> None:
        self.n_refreshed += 1


class Hand:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tier(shelf: Shelf, clock: Hand | None = None, *, can_trim: bool = True) -> DiskTier:
    return DiskTier(shelf, can_trim=can_trim, n_ctx=4096, clock=clock or Hand())


@dataclass(eq=False)
class Wanting:
    """As much of a Generation as the tier looks at."""

    tokens: Any
    kv: KVIdentity = BASE
    asked_disk: bool = False
    disk_until: float | None = None


@dataclass
class Row:
    view: TokenIds


def wanting(tokens: TokenIds, kv: KVIdentity = BASE) -> Any:
    return Wanting(Row(tokens), kv)


def held(n: int) -> Any:
    return lambda: n


def test_only_what_leads_clearly_further_is_waited_for():
    shelf = Shelf([stored(run_of(0, 300))])
    for n, waits in ((0, True), (300 - WORTH_SAVING, True), (301 - WORTH_SAVING, False), (300, False)):
        assert tier(shelf).is_awaited(wanting(run_of(0, 400)), held(n)) is waits
    assert not tier(shelf).is_awaited(wanting(run_of(0, WORTH_SAVING)), held(0)), "one token is always decoded"
    assert tier(shelf).is_awaited(wanting(run_of(0, WORTH_SAVING + 1)), held(0))
    assert not tier(shelf).is_awaited(wanting(run_of(900, 400)), held(0))


def test_the_file_that_leads_furthest_is_read():
    other = np.concatenate([run_of(0, 250), run_of(900, 200)])
    files = [stored(run_of(0, 200)), stored(other), stored(run_of(0, 300)), stored(run_of(0, 220))]
    assert tier(Shelf(files))._best(run_of(0, 400), BASE, 0) is files[2]
    assert tier(Shelf(files), can_trim=False)._best(run_of(0, 260), BASE, 0) is files[3], "whole, or at a checkpoint"
    files.append(stored(other, checkpoints=(100, 240, 300)))
    assert tier(Shelf(files), can_trim=False)._best(run_of(0, 260), BASE, 0) is files[4]
    assert tier(Shelf(files), can_trim=False)._best(run_of(0, 230), BASE, 0) is files[3]


def test_a_small_part_of_a_large_file_is_not_worth_reading_it():
    shelf = Shelf([stored(np.concatenate([run_of(0, 200), run_of(900, 3000)]))])
    assert not tier(shelf).is_awaited(wanting(run_of(0, 400)), held(0))


def test_a_file_longer_than_the_context_is_not_read():
    shelf = Shelf([stored(run_of(0, 5000))])
    assert not tier(shelf).is_awaited(wanting(run_of(0, 4000)), held(0))


def test_one_file_is_read_at_a_time_and_everyone_has_a_turn():
    shelf = Shelf([stored(run_of(0, 300)), stored(run_of(5000, 300))])
    disk, one, two = tier(shelf), wanting(run_of(0, 400)), wanting(run_of(5000, 400))
    assert disk.is_awaited(one, held(0))
    assert disk.is_awaited(two, held(0))
    assert len(shelf.readings) == 1
    shelf.readings[0].entry = Entry(run_of(0, 300), np.zeros(1, np.uint8), (), 0)
    shelf.readings[0].is_done = True
    assert not disk.is_awaited(one, held(0))
    assert disk.take(two) is None
    assert disk.take(one) is shelf.readings[0].entry
    assert disk.take(one) is None
    assert disk.is_awaited(two, held(0))
    assert len(shelf.readings) == 2


def test_a_disk_that_does_not_answer_is_not_waited_for():
    shelf, clock = Shelf([stored(run_of(0, 300))]), Hand()
    disk, one = tier(shelf, clock), wanting(run_of(0, 400))
    assert disk.is_awaited(one, held(0))
    clock.now = PATIENCE - 0.1
    assert disk.is_awaited(one, held(0))
    clock.now = PATIENCE
    assert not disk.is_awaited(one, held(0))
    assert disk.take(one) is None
    assert not disk.is_awaited(one, held(0))


def test_whoever_else_waits_nobody_waits_longer():
    """For a disk that hangs, nor for one that is slow with what others want."""
    shelf, clock = Shelf([stored(run_of(5000 * i, 300)) for i in range(4)]), Hand()
    disk, waiting = tier(shelf, clock), [wanting(run_of(5000 * i, 400)) for i in range(4)]
    one, two, three, late = waiting
    assert [disk.is_awaited(each, held(0)) for each in (one, two, three)] == [True] * 3
    clock.now = PATIENCE - 0.1
    shelf.readings[0].is_done = True
    assert not disk.is_awaited(one, held(0))
    disk.take(one)
    assert [disk.is_awaited(each, held(0)) for each in (two, three, late)] == [True] * 3
    clock.now = PATIENCE
    assert [disk.is_awaited(each, held(0)) for each in (two, three, late)] == [False] * 3, "it hangs"
    assert not disk.is_reading
    assert len(shelf.readings) == 2
    shelf.readings[1].is_done = True
    assert disk.is_awaited(wanting(run_of(0, 400)), held(0)), "it answers again"
    assert len(shelf.readings) == 3


def test_a_folder_that_does_not_open_is_not_waited_for():
    shelf, clock = Shelf([], is_opening=True), Hand()
    disk, one = tier(shelf, clock), wanting(run_of(0, 400))
    assert disk.is_awaited(one, held(0))
    clock.now = PATIENCE
    assert not disk.is_awaited(one, held(0))


def test_who_gives_up_makes_room_for_the_next():
    shelf = Shelf([stored(run_of(0, 300))])
    disk, one, two = tier(shelf), wanting(run_of(0, 400)), wanting(run_of(0, 500))
    assert disk.is_awaited(one, held(0))
    disk.attend([one, two])
    assert disk.is_reading
    disk.attend([two])
    assert not disk.is_reading
    assert disk.is_awaited(two, held(0))


def test_the_index_is_brought_up_to_date_now_and_then():
    shelf, clock = Shelf([]), Hand()
    disk = tier(shelf, clock)
    for now, times in ((0.1, 0), (FRESH, 1), (FRESH + 0.1, 1), (2 * FRESH, 2)):
        clock.now = now
        disk.is_awaited(wanting(run_of(0, 400)), held(0))
        assert shelf.n_refreshed == times


def test_what_the_disk_holds_is_not_written_again():
    shelf = Shelf([stored(run_of(0, 300))])
    disk = tier(shelf)
    assert [disk.wants(run_of(0, n), BASE) for n in (100, 200, 300, 301)] == [False, False, False, True]
    disk = tier(shelf, can_trim=False)
    assert [disk.wants(run_of(0, n), BASE) for n in (100, 200, 300, 301)] == [False, True, False, True]


def test_while_one_waits_for_the_disk_others_are_served(tmp_path: Path):
    bench, shelf = with_shelf(n_parallel=2)
    slow, _ = bench.ask(conversation(0))
    quick, _ = bench.ask("another", max_tokens=4)
    bench.settle(quick)
    assert not slow.is_answered
    shelf.readings[0].is_done = True
    bench.settle(slow)
    assert slow.text == alone(conversation(0))


def with_shelf(**config: Any) -> tuple[Bench, Shelf]:
    """A bench whose disk has what `conversation(0)` asks for, and takes its time."""
    bench = opened("plain", **config)
    shelf = Shelf([stored(bench.request(next_turn(conversation(0))).job.prompt)])
    bench.scheduler.disk = DiskTier(shelf, can_trim=True, n_ctx=8192, clock=lambda: bench.now)
    return bench, shelf


def test_who_waits_for_the_disk_can_be_cancelled_and_has_a_deadline():
    bench, shelf = with_shelf()
    sink, cancel = bench.ask(conversation(0))
    bench.step(2)
    cancel.cancel()
    bench.settle(sink, most=2)
    assert sink.terminal.reason == "cancelled"
    late, _ = bench.ask(conversation(0), deadline=1.0)
    bench.step(2)
    bench.now = 1.0
    bench.settle(late, most=2)
    assert len(shelf.readings) == 2
    after, _ = bench.ask("unheard of", max_tokens=4)
    bench.settle(after)


def test_a_hung_disk_delays_a_request_and_no_more():
    bench, _ = with_shelf()
    sink, _ = bench.ask(conversation(0))
    bench.step(3)
    assert not sink.is_answered
    bench.now = PATIENCE
    bench.settle(sink)
    assert (sink.text, sink.terminal.usage.cached_tokens) == (alone(conversation(0)), 0)


def test_a_worker_can_be_closed_while_somebody_waits_for_the_disk():
    bench, _ = with_shelf()
    sink, _ = bench.ask(conversation(0))
    bench.step(2)
    bench.shut_down()
    assert sink.is_answered


# --- in another process


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_a_worker_that_is_killed_leaves_a_folder_that_serves(kind: str, tmp_path: Path):
    """kill -9 while it evicts to the disk; then a worker here, on the same folder, says what is right."""
    rng = random.Random(3)
    command = [sys.executable, "-m", "tests.worker.disk_talker", kind, str(tmp_path)]
    for _ in range(10 if PROOF else 2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as talker:
            assert talker.stdout is not None
            while int(talker.stdout.readline()) < rng.randrange(2, 6):  # so many files are there
                pass
            talker.send_signal(signal.SIGKILL)
        with fake_worker(loader=fake_loader(hybrid=kind == "hybrid"), cache_dir=str(tmp_path)) as worker:
            with fake_worker() as cold:
                for i in range(6):
                    turn = prompt(i) + talk(cold, prompt(i)) + " and more"
                    assert talk(worker, turn) == talk(cold, turn)
            cache = worker.cache_metrics()
            assert cache.disk_hits > 0
            assert cache.disk_failures == 0


@pytest.fixture
def quiet_books() -> Iterator[PrefixCache]:
    cache = PrefixCache(n_seq=1, n_cells=4096, can_trim=True, can_share=True, can_save=True, can_trim_restored=True)
    yield cache
    cache.check()


def test_what_was_read_is_used_only_where_it_leads_further(quiet_books: PrefixCache):
    entry = Entry(run_of(0, 300), np.zeros(1, np.uint8), (), 0)
    loan = quiet_books.lend(np.concatenate([run_of(0, 250), ids(7)]), fetched=entry)
    assert (loan.recalled, loan.reused) == (entry, 250)
    quiet_books.give_back(loan.slot)
    loan = quiet_books.lend(np.concatenate([run_of(0, 250), ids(7)]), fetched=entry)
    assert (loan.recalled, loan.reused) == (None, 250)
    assert quiet_books.tier.counts.hits == 0


def test_a_budget_is_at_least_a_mebibyte():
    with pytest.raises(ConfigError, match="cache_disk"):
        ModelConfig(model="fake://model", cache_disk=0)


def test_an_export_without_a_folder_still_tells_what_is_kept(tmp_path: Path):
    bench = with_disk("plain", tmp_path)
    ask(bench, conversation(0))
    (entries,) = told(bench, Export(epoch=1))
    assert [entry.n > N for entry in entries] == [True]
    bench.shut_down()
