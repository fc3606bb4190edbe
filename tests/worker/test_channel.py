"""The channel: bounded for requests only, first come first served, and nothing accepted is lost."""

import asyncio
import time
from dataclasses import replace
from functools import partial

import pytest

from llama_worker import (
    DeadlineExceeded,
    GenerationCancelled,
    QueueFull,
    Reply,
    WorkerClosed,
    WorkerConfig,
    cancel_scope,
)
from llama_worker._channel import CommandChannel, Ticket
from llama_worker._commands import Generate, Shutdown
from llama_worker.testing import Gate, assert_well_formed, fake_loader, fake_worker
from tests.worker.bench import Bench
from tests.worker.waiting import in_thread, wait_until


def held_worker(gate: Gate, on_full: str = "wait"):
    """A worker whose engine is held in its first decode, so that whatever comes next has to wait."""
    behaviour = WorkerConfig(queue_size=1, on_full=on_full)  # type: ignore[arg-type]
    worker = fake_worker(loader=fake_loader(gate=gate), worker_config=behaviour, n_parallel=1)
    gate.shut()
    held = [worker.stream("held", max_tokens=4)]
    gate.wait_reached()
    return worker, held


def test_shutdown_and_reload_are_never_refused():
    channel = CommandChannel(capacity=1)
    assert all(channel.command(Shutdown()) for _ in range(100))


def test_a_full_channel_rejects_when_asked_to():
    gate = Gate()
    worker, held = held_worker(gate, on_full="reject")
    with worker:
        streams = fill(worker)
        with pytest.raises(QueueFull) as full:
            worker.generate("one too many")
        assert full.value.capacity == 1
        gate.open()
        for stream in [*held, *streams]:
            assert_well_formed(list(stream))


def test_waiting_callers_are_served_in_the_order_of_their_coming():
    bench = Bench("a", capacity=1).load()
    order: list[int] = []
    requests = [bench.request("x") for _ in range(5)]
    tickets = [Ticket(request, lambda i=i: order.append(i)) for i, request in enumerate(requests)]
    for ticket in tickets:
        bench.channel.offer(ticket)
    assert [ticket.accepted for ticket in tickets] == [True, False, False, False, False]
    bench.settle(*[request.sink for request in requests])
    assert order == [1, 2, 3, 4]


def test_a_caller_that_waits_gives_up_at_its_deadline():
    gate = Gate()
    worker, held = held_worker(gate)
    with worker:
        streams = fill(worker)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            worker.generate("too late", timeout=0.05)
        assert time.monotonic() - started < 5
        gate.open()
        for stream in [*held, *streams]:
            assert_well_formed(list(stream))


def test_a_caller_that_waits_can_be_cancelled():
    gate = Gate()
    worker, held = held_worker(gate)
    with worker:
        streams = fill(worker)
        with cancel_scope() as scope:
            outcome = in_thread(lambda: worker.generate("never"))
            wait_until(lambda: worker.status().callers_waiting == 1)
            scope.cancel()
            assert isinstance(outcome(), GenerationCancelled)
        gate.open()
        for stream in [*held, *streams]:
            assert_well_formed(list(stream))


def test_callers_that_wait_are_woken_when_the_worker_closes():
    gate = Gate()
    worker, _ = held_worker(gate)
    fill(worker)
    outcomes = [in_thread(lambda: worker.generate("never")) for _ in range(3)]
    wait_until(lambda: worker.status().callers_waiting == 3)
    gate.open()
    worker.close()
    assert all(isinstance(outcome(), WorkerClosed | Reply) for outcome in outcomes)
    with pytest.raises(WorkerClosed):
        worker.generate("afterwards")


async def test_async_callers_wait_without_blocking_their_loop():
    """Forty at once over a channel of one: all are served, and the loop's own ticks go on meanwhile."""
    with fake_worker("answer", worker_config=WorkerConfig(queue_size=1), n_parallel=2) as worker:
        ticks = asyncio.create_task(count_ticks())
        replies = await asyncio.gather(*[worker.agenerate(f"question {i}") for i in range(40)])
        ticks.cancel()
        assert [reply.text for reply in replies] == ["answer"] * 40


async def count_ticks() -> None:
    while True:
        await asyncio.sleep(0)


def test_a_reply_names_the_model_that_gave_it_and_not_the_one_it_was_asked_of():
    gate = Gate()
    worker, [held] = held_worker(gate)
    with worker:
        [waits] = fill(worker)
        reloaded = in_thread(lambda: worker.reload(model="fake://other"))
        wait_until(lambda: worker.status().state == "draining" or worker._channel.has_controls)
        gate.open()
        assert reloaded() is None
        assert (held.reply().model, waits.reply().model) == ("model", "other")
        assert asyncio.run(worker.agenerate("now")).model == "other"


def test_stale_requests_leave_the_channel_only_as_fast_as_they_are_prepared():
    """Otherwise a reload would let the line before the channel in, and lose everybody's turn."""
    bench = Bench("reply", capacity=2, n_parallel=1).load()
    requests = [bench.request(f"prompt {i}") for i in range(30)]
    for request in requests:
        bench.channel.offer(Ticket(request, lambda: None))
    change = bench.reload(n_ctx=512)
    while not all(request.sink.is_answered for request in requests):
        bench.step()
        assert len(bench.service.preparing) <= 2
        assert bench.channel.queued <= 2
    assert change.answer.result() is None
    assert all(request.sink.text == "reply" for request in requests)


def test_racing_senders_against_close_lose_nothing():
    """Whatever was accepted is answered; whatever was not raises WorkerClosed. Repeated, threads racing."""
    for _ in range(20):
        worker = fake_worker("answer", worker_config=WorkerConfig(queue_size=2))
        outcomes = [in_thread(partial(worker.generate, "hello")) for _ in range(8)]
        worker.close()
        ends = [outcome() for outcome in outcomes]
        assert all(isinstance(end, WorkerClosed) or end.text == "answer" for end in ends)


def test_whatever_is_accepted_is_handed_out_once_whoever_sends_it():
    """Eight threads with sessions and priorities of their own, some giving up, against one receiver and a close."""
    bench = Bench("reply").load()
    channel = CommandChannel(capacity=4)
    sent = [[asked_by(bench, f"session {i % 3}", i % 5 - 2) for i in range(100)] for _ in range(8)]
    tickets: list[Ticket] = []

    def send(requests: list[Generate]) -> None:
        for i, request in enumerate(requests):
            ticket = Ticket(request, lambda: None)
            tickets.append(ticket)
            channel.offer(ticket)
            if i % 7 == 0:
                channel.withdraw(ticket)

    senders = [in_thread(partial(send, requests)) for requests in sent]
    handed_out = []
    while len(handed_out) < 300:
        channel.wait(1.0)
        while channel.queued:
            handed_out.append(channel.peek())
            channel.take(handed_out[-1])
    left, _ = channel.close()
    for join in senders:
        assert join() is None
    handed_out += left
    assert len(set(handed_out)) == len(handed_out)
    assert set(handed_out) == {ticket.request for ticket in tickets if ticket.accepted}
    assert not [ticket for ticket in tickets if ticket.accepted and ticket.closed]


def asked_by(bench: Bench, session: str, priority: int) -> Generate:
    command = bench.request("x")
    asked = command.job.request.model_copy(update={"session": session, "priority": priority})
    return replace(command, job=replace(command.job, request=asked))


def fill(worker):
    """Fill the scheduler's waiting line and the channel behind a held engine."""
    streams = []
    while worker.status().queued < 1:
        streams.append(worker.stream("waits", max_tokens=4))
    return streams
