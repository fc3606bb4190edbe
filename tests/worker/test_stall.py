"""stall_timeout: a reader that has stopped reading gives its slot to others; by default it never does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_worker import ConfigError, Failed, Finished, StreamStalled, TextDelta, WorkerConfig
from llama_worker._stall import StallWatch
from llama_worker.testing import assert_well_formed, fake_worker
from tests.worker.bench import Bench, ListSink
from tests.worker.waiting import wait_until

LONG = {"max_tokens": 2000, "ignore_eos": True}


class Reader(ListSink):
    """A sink whose reader takes events when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def read(self) -> None:
        self.taken = len(self.events)

    def taken_while_waiting(self) -> int | None:
        return self.taken if self.taken < len(self.events) else None


def watched(timeout: float = 5.0) -> tuple[Bench, Reader]:
    bench = Bench(n_ctx=4096).load()
    bench.service.stalls = StallWatch(timeout)
    reader = Reader()
    bench.put(replace(bench.request("hello", **LONG), sink=reader))
    bench.step(3)
    return bench, reader


def test_a_reader_that_takes_nothing_for_so_long_loses_its_slot():
    bench, reader = watched()
    bench.now += 4.9
    bench.step()
    assert not reader.is_answered
    bench.now += 0.2
    bench.step()
    terminal = reader.terminal
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, StreamStalled)
    assert terminal.error.stall_timeout == 5.0
    assert terminal.text
    assert bench.scheduler.is_idle


def test_a_slow_reader_is_not_stalled():
    bench, reader = watched()
    for _ in range(20):
        bench.now += 4.0
        reader.read()
        bench.step()
    assert not reader.is_answered


def test_a_reader_for_whom_nothing_waits_is_not_stalled():
    bench, reader = watched()
    reader.read()
    bench.now += 1000
    reader.read()
    bench.service.stalls.look(bench.scheduler.running, bench.now)
    assert bench.service.stalls.look(bench.scheduler.running, bench.now + 1000) == []


def test_the_others_are_served_on():
    bench, reader = watched()
    other = Reader()
    bench.put(replace(bench.request("other", **LONG), sink=other))
    for _ in range(5):
        bench.now += 1.5
        other.read()
        bench.step()
    assert reader.is_answered
    assert not other.is_answered


def test_a_stream_that_nobody_reads_ends_and_says_why():
    with fake_worker(worker_config=WorkerConfig(stall_timeout=0.05), n_ctx=8192) as worker:
        stream = worker.stream("hello", max_tokens=8000, ignore_eos=True)
        first = next(stream)
        wait_until(lambda: not worker.status().running)
        terminal = assert_well_formed([first, *stream])
        assert isinstance(terminal, Failed)
        assert isinstance(terminal.error, StreamStalled)


async def test_so_does_an_async_one():
    with fake_worker(worker_config=WorkerConfig(stall_timeout=0.05), n_ctx=8192) as worker:
        async with worker.astream("hello", max_tokens=8000, ignore_eos=True) as stream:
            first = await anext(stream)
            assert isinstance(first, TextDelta)
            wait_until(lambda: not worker.status().running)  # and the loop, which would read, is held up
            terminal = assert_well_formed([first, *[event async for event in stream]])
        assert isinstance(terminal, Failed)
        assert isinstance(terminal.error, StreamStalled)


def test_whoever_waits_for_the_whole_reply_is_never_stalled():
    with fake_worker(worker_config=WorkerConfig(stall_timeout=0.001)) as worker:
        assert worker.generate("hello", max_tokens=300, ignore_eos=True).usage.completion_tokens == 300


def test_by_default_a_reader_may_come_back_at_any_time():
    with fake_worker("a reply that is read later") as worker:
        stream = worker.stream("hello")
        wait_until(lambda: worker.status().steps and not worker.status().running)
        assert isinstance(assert_well_formed(list(stream)), Finished)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "soon"])
def test_a_timeout_that_cannot_be_is_refused(value: object):
    with pytest.raises(ConfigError, match="stall_timeout"):
        WorkerConfig(stall_timeout=value)  # type: ignore[arg-type]
