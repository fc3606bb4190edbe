"""Whose turn it is: priorities, clients, and that nobody waits for ever."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker import GenerationRequest, InvalidRequestError, WorkerConfig
from llama_worker._channel import CommandChannel, Ticket
from llama_worker._commands import Generate
from llama_worker._fairness import PATIENCE, FairQueue
from llama_worker.testing import Gate, fake_loader, fake_worker
from tests.worker.bench import Bench, ListSink
from tests.worker.waiting import in_thread, wait_until

ORDERS = {
    "one client is served in its order": (["a1", "a2", "a3"], "a1 a2 a3"),
    "clients take turns": (["a1", "a2", "a3", "b1", "b2"], "a1 b1 a2 b2 a3"),
    "a latecomer waits for one turn of each": (["a1", "a2", "a3", "b1", "b2", "c1"], "a1 b1 c1 a2 b2 a3"),
    "the higher priority goes first": (["a1", "b1+2", "a2", "c1+1"], "b1+2 c1+1 a1 a2"),
    "also of the same client": (["a1", "a2", "a3+1"], "a3+1 a1 a2"),
    "a lower one goes last": (["a1-1", "b1", "c1-2"], "b1 a1-1 c1-2"),
    "clients take turns within a priority": (["a1+1", "a2+1", "b1+1", "b2", "a3"], "a1+1 b1+1 a2+1 b2 a3"),
}


@pytest.mark.parametrize(("arrivals", "order"), ORDERS.values(), ids=ORDERS.keys())
def test_the_order_of_turns(arrivals: list[str], order: str):
    """A name is its client's letter, a number and its priority."""
    waiting: FairQueue[str] = FairQueue()
    for name in arrivals:
        waiting.push(name, name[0], int(name[2:] or 0))
    assert list(waiting) == arrivals
    assert " ".join(served(waiting, len(waiting))) == order


def served(waiting: FairQueue[Any], turns: int) -> list[Any]:
    order = []
    for _ in range(turns):
        order.append(waiting.next())
        waiting.take(order[-1])
    return order


def test_a_priority_that_is_passed_over_often_gets_a_turn():
    waiting: FairQueue[Any] = FairQueue()
    for i in range(100):
        waiting.push(("high", i), "flood", 3)
    waiting.push("middle", "b", 0)
    waiting.push("low", "a", -3)
    order = served(waiting, 40)
    assert (order.index("middle"), order.index("low")) == (PATIENCE, PATIENCE + 1)


def test_who_goes_away_costs_its_client_no_turn():
    waiting: FairQueue[str] = FairQueue()
    for name in ("a1", "a2", "b1"):
        waiting.push(name, name[0], 0)
    waiting.remove("a1")
    assert served(waiting, 2) == ["a2", "b1"]


CLIENTS, PRIORITIES = "abcd", (-1, 0, 2)
STEPS = st.one_of(st.tuples(st.sampled_from(CLIENTS), st.sampled_from(PRIORITIES)), st.just("take"), st.integers(0, 50))


@given(st.lists(STEPS, max_size=300))
@settings(max_examples=200, deadline=None)
def test_everyone_is_served_once_and_overtaken_a_bounded_number_of_times(steps: list[Any]):
    """The k-th of its client waits for at most k turns of each client, and its priority for PATIENCE of others."""
    waiting: FairQueue[int] = FairQueue()
    place: dict[int, tuple[str, int]] = {}
    patience: dict[int, int] = {}
    gone: Counter[int] = Counter()
    last: dict[tuple[str, int], int] = {}

    def take() -> None:
        item = waiting.next()
        waiting.take(item)
        gone[item] += 1
        assert last.get(place[item], -1) < item, "a client's own order was changed"
        last[place[item]] = item
        for other in waiting:
            patience[other] -= 1
            assert patience[other] > 0, "somebody is overtaken without bound"

    for item, step in enumerate(steps):
        if isinstance(step, tuple):
            place[item] = step
            ahead = 1 + sum(place[other] == step for other in waiting)
            patience[item] = ahead * len(CLIENTS) * (PATIENCE + len(PRIORITIES))
            waiting.push(item, *step)
        elif step == "take" and waiting:
            take()
        elif isinstance(step, int) and step < len(waiting):
            cancelled = list(waiting)[step]
            waiting.remove(cancelled)
            gone[cancelled] += 1
    while waiting:
        take()
    assert gone == Counter(place.keys())


def request(bench: Bench, session: str | None = None, priority: int = 0) -> Generate:
    command = bench.request("x")
    asked = GenerationRequest(**{**dict(command.job.request), "session": session, "priority": priority})
    return replace(command, job=replace(command.job, request=asked))


def test_a_flood_does_not_delay_the_request_of_another_session():
    bench = Bench("reply", n_parallel=1).load()
    flood = [request(bench, "flood") for _ in range(40)]
    for command in [*flood, lone := request(bench, "lone")]:
        bench.put(command)
    assert isinstance(lone.sink, ListSink)
    bench.settle(lone.sink)
    assert sum(command.sink.is_answered for command in flood) <= 3
    bench.settle(*[command.sink for command in flood])


def test_of_five_hundred_waiting_callers_another_client_waits_for_two():
    bench = Bench("reply").load()
    channel = CommandChannel(capacity=1)
    for ticket in [Ticket(request(bench, "flood"), lambda: None) for _ in range(500)]:
        channel.offer(ticket)
    lone = Ticket(request(bench, "lone"), lambda: None)
    channel.offer(lone)
    taken = []
    while not lone.accepted:
        taken.append(channel.peek())
        channel.take(taken[-1])
    assert len(taken) == 2
    assert channel.peek() is lone.request


def test_without_a_session_the_thread_is_the_client():
    bench = Bench("reply").load()
    channel = CommandChannel(capacity=8)
    mine = [request(bench) for _ in range(3)]
    for command in mine:
        channel.offer(Ticket(command, lambda: None))
    theirs = request(bench)
    in_thread(lambda: channel.offer(Ticket(theirs, lambda: None)))()
    order = []
    while channel.queued:
        order.append(channel.peek())
        channel.take(order[-1])
    assert order == [mine[0], theirs, mine[1], mine[2]]


def test_an_urgent_call_overtakes_those_that_wait_for_room():
    gate = Gate()
    loader = fake_loader(*[str(turn) for turn in range(12)], gate=gate)  # the reply says when it began
    worker = fake_worker(loader=loader, worker_config=WorkerConfig(queue_size=1), n_parallel=1)
    with worker:
        gate.shut()
        held = worker.stream("held")
        gate.wait_reached()
        joins = []
        for i in range(10):
            joins.append(in_thread(lambda i=i: worker.generate("x", session=f"patient {i}")))
            wait_until(lambda i=i: occupied(worker) == i + 2)
        urgent = in_thread(lambda: worker.generate("x", session="urgent", priority=3))
        wait_until(lambda: occupied(worker) == 12)
        gate.open()
        assert urgent().text == "2"  # behind the one that ran and the one in the channel
        assert sorted(int(join().text) for join in joins) == [1, *range(3, 12)]
        assert held.reply().text == "0"


def occupied(worker: Any) -> int:
    status = worker.status()
    return status.running + status.waiting + status.queued + status.callers_waiting


def test_ten_thousand_texts_do_not_hold_up_a_single_one():
    bench = Bench(n_parallel=1).load()
    many, _ = bench.embed(*[f"text {i} of many" for i in range(2000)])
    bench.step(2)
    one, _ = bench.embed("short")
    bench.step(3)
    assert one.done()
    assert not many.done()
    bench.settle(many)
    assert len(many.result()) == 2000


def test_a_flood_of_embeddings_stays_in_the_channel_where_turns_are_taken():
    bench = Bench(n_parallel=1, capacity=500).load()
    flood = [bench.embed(f"text {i}")[0] for i in range(400)]
    bench.step()
    lone = in_thread(lambda: bench.embed("alone")[0])()
    bench.settle(lone)
    assert sum(answer.done() for answer in flood) < 100
    bench.settle(*flood)


@pytest.mark.parametrize(
    ("field", "value"), [("session", ""), ("session", "s" * 257), ("session", 7), ("priority", 4), ("priority", "high")]
)
def test_a_session_or_priority_that_cannot_be_is_refused(field: str, value: Any):
    with fake_worker("a") as worker:
        for call in (worker.generate, worker.stream, worker.astream, lambda text, **kw: worker.embed([text], **kw)):
            with pytest.raises(InvalidRequestError) as wrong:
                call("hello", **{field: value})
            assert wrong.value.field == field


def test_a_request_brings_its_own_session():
    with fake_worker("a") as worker:
        assert worker.generate(GenerationRequest(prompt="hello", session="mine", priority=1)).text == "a"
        with pytest.raises(InvalidRequestError, match="brings its own"):
            worker.generate(GenerationRequest(prompt="hello"), session="other")


async def test_sessions_and_priorities_are_for_every_way_to_ask():
    with fake_worker("a", "b", "c", "d") as worker:
        assert worker.stream("x", session="s", priority=1).reply().text == "a"
        assert (await worker.agenerate("x", session="s", priority=-1)).text == "b"
        async with worker.astream("x", session="s") as stream:
            assert (await stream.reply()).text == "c"
        assert len(worker.embed(["x"], session="s", priority=2)) == 1
        assert len(await worker.aembed(["x"], session="s", priority=2)) == 1
