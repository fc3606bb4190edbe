"""infer_batch: many prompts in one call, in order, each with its own end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llama_worker import (
    ContextOverflowError,
    DeadlineExceeded,
    GenerationCancelled,
    GenerationRequest,
    InvalidRequestError,
    LlamaWorker,
    Message,
    ModelConfig,
    Reply,
    SamplingParams,
    WorkerClosed,
    WorkerConfig,
    cancel_scope,
)
from llama_worker._batch import Batch
from llama_worker._cancel import CancelFlag
from llama_worker.testing import Fault, Gate, fake_loader, fake_worker
from tests.worker.waiting import in_thread, until, wait_until


def both_ways(worker: LlamaWorker, prompts: Sequence[Any], **options: Any) -> list[list[Reply | Exception]]:
    """The outcomes of infer_batch and of ainfer_batch."""
    return [worker.infer_batch(prompts, **options), asyncio.run(worker.ainfer_batch(prompts, **options))]


def test_each_prompt_gets_the_reply_that_it_would_get_alone():
    with fake_worker(n_ctx=512) as worker:
        prompts = [f"question {i} " + "pad " * (i % 7) for i in range(30)]
        alone = [worker.generate(prompt, max_tokens=20).text for prompt in prompts]
        for outcomes in both_ways(worker, prompts, max_tokens=20):
            assert [outcome.text for outcome in outcomes if isinstance(outcome, Reply)] == alone


def test_prompts_may_be_of_every_kind():
    prompts = [
        "raw",
        [Message(role="user", content="chat")],
        [{"role": "user", "content": "mapping"}],
        GenerationRequest(prompt="own", params=SamplingParams(max_tokens=2)),
    ]
    with fake_worker() as worker:
        for outcomes in both_ways(worker, prompts):
            assert all(isinstance(outcome, Reply) for outcome in outcomes)
            assert isinstance(outcomes[3], Reply)
            assert outcomes[3].usage.completion_tokens <= 2


@pytest.mark.engine
def test_a_batch_on_the_real_engine(tiny_llama: Path):
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1)
    with LlamaWorker(config, WorkerConfig(queue_size=2)) as worker:
        for outcomes in both_ways(worker, [f"prompt {i}" for i in range(20)], max_tokens=5, ignore_eos=True):
            assert [o.usage.completion_tokens for o in outcomes if isinstance(o, Reply)] == [5] * 20


def test_one_failure_does_not_sink_the_others():
    prompts = ["good", "x" * 5000, 7, [{"role": "nobody", "content": "?"}], "good too"]
    with fake_worker("fine", n_ctx=512) as worker:
        for outcomes in both_ways(worker, prompts):
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds == [Reply, ContextOverflowError, InvalidRequestError, InvalidRequestError, Reply]


def test_the_engine_failing_one_step_fails_only_who_was_in_it():
    faults = [Fault("sample", RuntimeError("broken"), nth=10**9)]
    with fake_worker(loader=fake_loader("fine", faults=faults)) as worker:
        assert all(isinstance(outcome, Reply) for outcome in worker.infer_batch(["a"] * 10))


def test_an_empty_batch_is_answered_at_once():
    with fake_worker() as worker:
        assert both_ways(worker, []) == [[], []]


@pytest.mark.parametrize("on_full", ["wait", "reject"])
def test_a_batch_may_be_longer_than_the_channel(on_full: Any):
    behaviour = WorkerConfig(queue_size=1, on_full=on_full)
    with fake_worker("fine", worker_config=behaviour, n_parallel=2) as worker:
        for outcomes in both_ways(worker, [f"prompt {i}" for i in range(60)]):
            assert [outcome.text for outcome in outcomes if isinstance(outcome, Reply)] == ["fine"] * 60


def test_a_batch_has_one_place_in_the_line_and_no_thread_of_its_own():
    gate = Gate()
    worker = fake_worker("fine", loader=fake_loader("fine", gate=gate), worker_config=WorkerConfig(queue_size=2))
    with worker:
        gate.shut()
        batch = in_thread(lambda: worker.infer_batch([f"prompt {i}" for i in range(50)]))
        gate.wait_reached()
        wait_until(lambda: worker.status().callers_waiting)
        threads = threading.active_count()
        status = worker.status()
        assert (status.callers_waiting, status.queued) == (1, 2)
        gate.open()
        assert len(batch()) == 50
        assert threading.active_count() <= threads


@pytest.mark.parametrize("most", [1, 3])
def test_at_most_so_many_are_under_way(most: int):
    gate = Gate()
    worker = fake_worker("fine", loader=fake_loader("fine", gate=gate), n_parallel=8)
    with worker:
        gate.shut()
        batch = in_thread(lambda: worker.infer_batch([f"prompt {i}" for i in range(20)], max_concurrency=most))
        gate.wait_reached()
        status = worker.status()
        assert 1 <= status.running + status.waiting + status.queued + status.callers_waiting <= most
        gate.open()
        assert [type(outcome) for outcome in batch()] == [Reply] * 20


@pytest.mark.parametrize(
    "bad", [{"max_concurrency": 0}, {"timeout": -1}, {"session": ""}, {"warmth": 1}, {"top_k": -5}]
)
def test_what_is_wrong_with_all_is_raised_at_once(bad: dict[str, Any]):
    with fake_worker() as worker, pytest.raises(InvalidRequestError) as wrong:
        worker.infer_batch(["a", "b"], **bad)
    assert wrong.value.field in bad


@pytest.mark.parametrize("prompts", ["one text", 7, {"role": "user", "content": "hello"}])
def test_something_that_is_no_list_is_refused(prompts: Any):
    with fake_worker() as worker, pytest.raises(InvalidRequestError, match="prompts"):
        worker.infer_batch(prompts)


def test_the_timeout_counts_from_the_call_for_each():
    faults = [Fault("decode", "hang", nth=1), Fault("decode", "hang", nth=2)]
    for ask in (LlamaWorker.infer_batch, lambda *args, **kw: asyncio.run(LlamaWorker.ainfer_batch(*args, **kw))):
        loader = fake_loader("fine", faults=faults)
        with fake_worker(loader=loader, worker_config=WorkerConfig(queue_size=1), n_parallel=1) as worker:
            started = time.monotonic()
            outcomes = ask(worker, ["a"] * 6, timeout=0.1)
            assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 6
            assert time.monotonic() - started < 5


def test_a_scope_that_is_cancelled_ends_them_all():
    gate = Gate()
    worker = fake_worker("fine", loader=fake_loader("fine", gate=gate), worker_config=WorkerConfig(queue_size=2))
    with worker:
        gate.shut()
        with cancel_scope() as scope:
            batch = in_thread(lambda: worker.infer_batch(["a"] * 30))
            gate.wait_reached()
            scope.cancel()
            assert [type(outcome) for outcome in batch()] == [GenerationCancelled] * 30


async def test_a_task_that_is_cancelled_cancels_them_all():
    gate = Gate()
    worker = fake_worker("fine", loader=fake_loader("fine", gate=gate), worker_config=WorkerConfig(queue_size=2))
    with worker:
        gate.shut()
        batch = asyncio.create_task(worker.ainfer_batch(["a"] * 30))
        await until(lambda: worker.status().callers_waiting)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        gate.open()
        wait_until(lambda: not (worker.status().running or worker.status().waiting or worker.status().queued))
        assert worker.status().callers_waiting == 0
        assert (await worker.agenerate("afterwards")).text == "fine"


def test_ctrl_c_cancels_them_all():
    flags: list[CancelFlag] = []

    def new_flag(timeout: float | None) -> tuple[CancelFlag, float | None]:
        flags.append(CancelFlag())
        return flags[-1], None

    def submit(*of_third: Any) -> None:
        if of_third[2] is flags[2]:
            raise KeyboardInterrupt

    batch = Batch(["a"] * 5, lambda prompt: GenerationRequest(prompt=str(prompt)), new_flag, None, lambda: False)
    with pytest.raises(KeyboardInterrupt):
        batch.run(submit)
    assert [flag.cancelled for flag in flags] == [True] * 5


def test_a_worker_that_closes_answers_the_whole_batch():
    gate = Gate()
    worker = fake_worker("fine", loader=fake_loader("fine", gate=gate), worker_config=WorkerConfig(queue_size=1))
    gate.shut()
    batch = in_thread(lambda: worker.infer_batch(["a"] * 20))
    gate.wait_reached()
    worker.close()
    assert [type(outcome) for outcome in batch()] == [WorkerClosed] * 20


async def test_the_loop_goes_on_while_a_batch_is_served():
    with fake_worker(n_ctx=512, worker_config=WorkerConfig(queue_size=1)) as worker:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        outcomes = await worker.ainfer_batch([f"prompt {i}" for i in range(40)], max_tokens=20)
        ticking.cancel()
        assert all(isinstance(outcome, Reply) for outcome in outcomes)
        assert ticks > 40


def test_a_batch_that_waits_for_room_is_never_refused():
    settings = WorkerConfig(queue_size=1, on_full="reject")
    with fake_worker("answer", worker_config=settings, n_parallel=1) as worker:
        replies = worker.infer_batch([f"prompt {i}" for i in range(20)])
        assert [reply.text for reply in replies if isinstance(reply, Reply)] == ["answer"] * 20
        assert worker.metrics().refused == 0
