"""Cancelled at each place where a request can be: it ends once, at once, and what it computed stays."""

import asyncio
import gc

import pytest

from llama_worker import (
    DeadlineExceeded,
    Failed,
    Finished,
    GenerationCancelled,
    StreamEvent,
    TextDelta,
    cancel_scope,
)
from llama_worker._engine.base import DecodeStatus
from llama_worker.testing import FakeEngine, Fault, Gate, assert_well_formed, fake_loader, fake_worker
from tests.worker.bench import Bench
from tests.worker.waiting import in_thread, until, wait_until


def test_cancelled_while_it_waits_for_a_slot():
    bench = Bench(n_parallel=1).load()
    running, _ = bench.ask("a", max_tokens=50, ignore_eos=True)
    waiting, cancel = bench.ask("b")
    bench.step(2)
    cancel.cancel()
    bench.step()
    assert ended_as(waiting) == "cancelled"
    assert not running.is_answered


def test_cancelled_between_two_chunks_of_its_prompt():
    bench = Bench(n_ctx=8192, n_ubatch=64).load()
    sink, cancel = bench.ask("p" * 1000)
    bench.step(3)
    cancel.cancel()
    bench.step()
    assert ended_as(sink) == "cancelled"
    assert bench.scheduler.cache.slots[0].n >= 128


def test_cancelled_while_it_decodes_it_keeps_what_it_said():
    bench = Bench("a rather long answer").load()
    sink, cancel = bench.ask("hello", max_tokens=100)
    bench.step(6)
    cancel.cancel()
    bench.step()
    assert ended_as(sink) == "cancelled"
    assert sink.text
    assert "a rather long answer".startswith(sink.text)


def test_cancelled_while_text_is_held_back():
    """What might have become a stop string is shown after all."""
    bench = Bench("one STO two").load()
    sink, cancel = bench.ask("hello", max_tokens=100, stop="STOP")
    while not any(isinstance(e, TextDelta) for e in sink.events) or sum(len(e.text) for e in sink.events) < 4:
        bench.step()
    bench.step(3)
    cancel.cancel()
    bench.step()
    assert ended_as(sink) == "cancelled"
    assert sink.text == "one STO"


@pytest.mark.parametrize("hybrid", [False, True])
def test_after_an_aborted_decode_the_request_goes_on_as_if_nothing_had_been(hybrid: bool):
    """A spurious abort is a retry: same text as without, for those in the batch too."""
    texts = []
    for faults in ([], [Fault("decode", DecodeStatus.ABORTED, 4)]):
        engines: list[FakeEngine] = []
        bench = Bench(
            loader=fake_loader(faults=faults, hybrid=hybrid, seen=engines.append), n_ctx=4096, n_parallel=3
        ).load()
        bench.engines = engines
        sinks = [bench.ask(f"{i} " * 30, max_tokens=20, ignore_eos=True)[0] for i in range(3)]
        bench.settle(*sinks)
        texts.append([sink.text for sink in sinks])
    assert texts[0] == texts[1]


def test_a_cancelled_prefill_is_reused_by_the_next_request():
    bench = Bench(n_ctx=8192, n_ubatch=64).load()
    _, cancel = bench.ask("p" * 1000)
    bench.step(5)
    cancel.cancel()
    bench.step()
    again, _ = bench.ask("p" * 1000)
    bench.settle(again)
    assert again.terminal.usage.cached_tokens >= 256


def test_a_deadline_ends_a_request_wherever_it_is():
    bench = Bench(n_parallel=1).load()
    running, _ = bench.ask("a", deadline=1.0, max_tokens=500, ignore_eos=True)
    waiting, _ = bench.ask("b", deadline=1.0)
    bench.step(3)
    bench.now = 2.0
    bench.step()
    for sink in (running, waiting):
        assert isinstance(sink.terminal, Failed)
        assert isinstance(sink.terminal.error, DeadlineExceeded)
    assert running.terminal.text


def test_a_reader_that_waits_is_the_timer_that_aborts_a_running_decode():
    engines: list[FakeEngine] = []
    with fake_worker(loader=fake_loader(faults=[Fault("decode", "hang")], seen=engines.append)) as worker:
        while not engines[0].hanging.is_set():  # a deadline that passes before the decode shows nothing
            with pytest.raises(DeadlineExceeded):
                worker.generate("hello", timeout=0.05)
        assert worker.generate("hello", max_tokens=2).usage.completion_tokens <= 2


async def test_an_async_reader_is_its_own_timer_too():
    engines: list[FakeEngine] = []
    with fake_worker(loader=fake_loader(faults=[Fault("decode", "hang")], seen=engines.append)) as worker:
        while not engines[0].hanging.is_set():
            with pytest.raises(DeadlineExceeded):
                await worker.agenerate("hello", timeout=0.05)


def test_leaving_closing_and_dropping_a_stream_cancel_its_request():
    gate = Gate()
    with fake_worker(loader=fake_loader(gate=gate), n_parallel=4) as worker:
        with worker.stream("a", max_tokens=4000, ignore_eos=True) as left:
            next(left)
        closed = worker.stream("b", max_tokens=4000, ignore_eos=True)
        next(closed)
        closed.close()
        dropped = worker.stream("c", max_tokens=4000, ignore_eos=True)
        next(dropped)
        del dropped
        gc.collect()
        wait_until(lambda: not worker.status().running and not worker.status().waiting)
        assert isinstance(assert_well_formed_tail(left), Finished)


def test_a_stream_that_is_closed_after_its_end_changes_nothing():
    with fake_worker("answer") as worker:
        stream = worker.stream("hello")
        assert stream.reply().text == "answer"
        stream.close()
        assert list(stream) == []


async def test_a_cancelled_task_cancels_its_request():
    with fake_worker() as worker:
        task = asyncio.create_task(worker.agenerate("hello", max_tokens=4000, ignore_eos=True))
        await until(lambda: worker.status().running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not worker.status().running)
        assert (await worker.agenerate("hello", max_tokens=3)).usage.completion_tokens <= 3


async def test_leaving_an_async_iteration_cancels_its_request():
    """In a decode that nothing else ends."""
    with fake_worker(loader=fake_loader(faults=[Fault("decode", "hang", 3)])) as worker:
        async for _ in worker.astream("hello", max_tokens=4000, ignore_eos=True):
            break
        gc.collect()
        await until(lambda: not worker.status().running)
        assert worker.metrics().finished == {"cancelled": 1}


def test_a_loop_that_ends_cancels_what_its_tasks_wait_for():
    with fake_worker(loader=fake_loader(faults=[Fault("decode", "hang", 2)])) as worker:
        stream = worker.astream("hello", max_tokens=4000, ignore_eos=True)

        async def begin() -> asyncio.Future[StreamEvent]:
            await anext(stream)
            waits = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            return waits

        assert asyncio.run(begin()).cancelled()
        wait_until(lambda: worker.status().running == 0)
        assert worker.metrics().finished == {"cancelled": 1}


def test_a_loop_that_closed_under_a_reader_cancels_its_request():
    gate = Gate()
    with fake_worker(loader=fake_loader(gate=gate)) as worker:
        stream, loop = worker.astream("hello", max_tokens=4000, ignore_eos=True), asyncio.new_event_loop()

        async def begin() -> asyncio.Future[StreamEvent]:
            await anext(stream)
            gate.shut()
            await asyncio.to_thread(gate.wait_reached)
            while stream._mailbox._events:
                await anext(stream)
            waits = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            return waits

        waits = loop.run_until_complete(begin())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gate.open()
        wait_until(lambda: worker.status().running == 0)
        assert worker.metrics().finished == {"cancelled": 1}
        assert not waits.done(), "nobody told the reader"
        waits._log_destroy_pending = False


def test_a_scope_cancels_what_is_submitted_beneath_it_and_nothing_else():
    with fake_worker(n_parallel=4) as worker:
        outside = worker.stream("outside", max_tokens=30, ignore_eos=True)
        with cancel_scope() as scope:
            outcomes = [in_thread(lambda: worker.generate("in", max_tokens=4000, ignore_eos=True)) for _ in range(2)]
            wait_until(lambda: worker.status().running + worker.status().waiting >= 2)
            scope.cancel()
            for outcome in outcomes:
                error = outcome()
                assert isinstance(error, GenerationCancelled)
                assert error.partial is None or error.partial.finish_reason == "cancelled"
            with pytest.raises(GenerationCancelled):
                worker.generate("submitted after the cancel")
        assert outside.reply().usage.completion_tokens == 30


def test_nested_scopes_and_their_deadlines():
    engines: list[FakeEngine] = []
    with fake_worker(loader=fake_loader(faults=[Fault("decode", "hang")], seen=engines.append)) as worker:
        while not engines[0].hanging.is_set():
            with cancel_scope(deadline=60), cancel_scope(deadline=0.05), pytest.raises(DeadlineExceeded):
                worker.generate("hello")
        assert worker.generate("hello", max_tokens=1).usage.completion_tokens <= 1


def test_a_scope_holds_no_request_alive():
    with fake_worker("a") as worker, cancel_scope() as scope:
        worker.generate("hello")
        gc.collect()
        assert not list(scope._flags)


def test_cancel_all_ends_everything():
    with fake_worker(n_parallel=2) as worker:
        streams = [worker.stream(f"{i}", max_tokens=4000, ignore_eos=True) for i in range(5)]
        worker.cancel_all()
        ends = [assert_well_formed(list(stream)) for stream in streams]
        assert all(isinstance(end, Finished) and end.reason == "cancelled" for end in ends)


def ended_as(sink) -> str:
    terminal = sink.terminal
    assert isinstance(terminal, Finished)
    return terminal.reason


def assert_well_formed_tail(stream):
    """The rest of a stream whose beginning was read."""
    rest = list(stream)
    assert sum(isinstance(event, Finished | Failed) for event in rest) == 1
    return rest[-1]
