"""Each engine call x each way to fail: nobody hangs, the stream rule holds, the books stay right."""

import itertools

import pytest

from llama_worker import (
    DeadlineExceeded,
    Failed,
    Finished,
    GenerationError,
    Message,
    ModelConfig,
    WorkerClosed,
    WorkerDied,
)
from llama_worker._engine.base import DecodeStatus
from llama_worker.testing import FakeEngine, Fault, assert_well_formed, fake_loader, fake_worker
from tests.worker.waiting import in_thread

CALLS = ["decode", "sample", "logits", "new_sampler", "seq_end", "seq_trim", "seq_clear", "seq_share", "embed", "close"]
PROMPTS = [[Message(role="user", content="s" * 200 + f" question {i}")] for i in range(6)]


@pytest.mark.parametrize(("call", "nth"), list(itertools.product(CALLS, [1, 2, 5])))
def test_an_engine_that_raises_hangs_nobody(call: str, nth: int):
    """Everyone is answered: in order, or with WorkerDied whose cause is what the engine raised."""
    broken = RuntimeError("the engine broke")
    loader = fake_loader(faults=[Fault(call, broken, nth)])  # type: ignore[arg-type]
    worker = fake_worker(loader=loader, n_ctx=1024, n_parallel=2)
    outcomes = run_everything(worker)
    worker.close()
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert all(isinstance(failure, WorkerClosed) for failure in failures)
    assert all(failure.__cause__ is broken for failure in failures if isinstance(failure, WorkerDied))
    assert worker.status().state in ("closed", "dead")


@pytest.mark.parametrize(
    ("status", "nth"),
    list(itertools.product([s for s in DecodeStatus if s is not DecodeStatus.OK], [1, 2, 7])),
)
def test_a_decode_that_returns_an_error_code_fails_its_batch_and_no_more(status: DecodeStatus, nth: int):
    engines: list[FakeEngine] = []
    loader = fake_loader(faults=[Fault("decode", status, nth)], seen=engines.append)
    with fake_worker(loader=loader, n_ctx=4096, n_parallel=2) as worker:
        outcomes = run_everything(worker)
        afterwards = worker.generate(PROMPTS[0], max_tokens=8)
        assert worker.status().state == "ready"
    recoverable = status in (DecodeStatus.KV_FULL, DecodeStatus.ABORTED)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert len(failed) <= (0 if recoverable else 2)
    with fake_worker(n_ctx=4096, n_parallel=2) as fresh:
        assert afterwards.text == fresh.generate(PROMPTS[0], max_tokens=8).text


@pytest.mark.parametrize("nth", [1, 3])
def test_a_decode_that_does_not_return_ends_when_its_request_is_cancelled(nth: int):
    engines: list[FakeEngine] = []
    loader = fake_loader(faults=[Fault("decode", "hang", nth)], seen=engines.append)
    with fake_worker(loader=loader, n_ctx=4096, n_parallel=2) as worker:
        streams = [worker.stream(prompt, max_tokens=8, ignore_eos=True) for prompt in PROMPTS[:2]]
        assert engines[0].hanging.wait(10)
        for stream in streams:
            stream.close()
        ends = [assert_well_formed(list(stream)) for stream in streams]
        assert [end.reason for end in ends if isinstance(end, Finished)] == ["cancelled", "cancelled"]
        assert worker.generate(PROMPTS[2], max_tokens=4, ignore_eos=True).usage.completion_tokens == 4


@pytest.mark.parametrize("nth", [1, 2])
def test_an_embedding_that_does_not_return_ends_at_its_deadline(nth: int):
    with fake_worker(loader=fake_loader(faults=[Fault("embed", "hang", nth)])) as worker:
        for _ in range(nth - 1):
            worker.embed(["before"])
        with pytest.raises(DeadlineExceeded):
            worker.embed(["now"], timeout=0.05)
        assert len(worker.embed(["afterwards"])) == 1


@pytest.mark.parametrize("call", ["sample", "new_sampler"])
def test_a_typed_error_of_one_request_fails_that_request_alone(call: str):
    """No token left to choose, a sampler that cannot be made: the worker and the others go on."""
    loader = fake_loader(faults=[Fault(call, GenerationError("not this one"), 1)])  # type: ignore[arg-type]
    with fake_worker(loader=loader, n_ctx=4096, n_parallel=4) as worker:
        outcomes = run_everything(worker)
        assert [type(outcome).__name__ for outcome in outcomes if isinstance(outcome, Exception)] == ["GenerationError"]
        assert worker.status().state == "ready"


def test_closing_ends_a_call_that_does_not_return():
    worker = fake_worker(loader=fake_loader(faults=[Fault("decode", "hang", 2)]), n_ctx=4096)
    stream = worker.stream(PROMPTS[0], max_tokens=50, ignore_eos=True)
    first = next(stream)
    worker.close()
    end = assert_well_formed([first, *stream])
    assert isinstance(end, Failed)
    assert isinstance(end.error, WorkerClosed)


def test_a_loader_that_raises_is_what_the_constructor_raises():
    def loader(config: ModelConfig) -> None:
        raise OSError("disk on fire")

    with pytest.raises(WorkerDied) as died:
        fake_worker(loader=loader)  # type: ignore[arg-type]
    assert isinstance(died.value.__cause__, OSError)


def run_everything(worker: object) -> list[object]:
    """Six chats and two embeddings at once, sharing prefixes; what each ended with, within the test's timeout."""
    from concurrent.futures import ThreadPoolExecutor

    def chat(prompt: list[Message]) -> object:
        stream = worker.stream(prompt, max_tokens=12, logprobs=1)  # type: ignore[attr-defined]
        end = assert_well_formed(list(stream))
        return end.error if isinstance(end, Failed) else end

    def embed(i: int) -> object:
        return worker.embed([f"text {i}", "another"])  # type: ignore[attr-defined]

    def outcome(task: object, argument: object) -> object:
        try:
            return task(argument)  # type: ignore[operator]
        except Exception as exc:  # noqa: BLE001
            return exc

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(outcome, chat, prompt) for prompt in PROMPTS]
        jobs += [pool.submit(outcome, embed, i) for i in range(2)]
        return [job.result(timeout=60) for job in jobs]


def test_closing_ends_an_embedding_that_does_not_return_with_worker_closed():
    engines: list[FakeEngine] = []
    worker = fake_worker(loader=fake_loader(faults=[Fault("embed", "hang")], seen=engines.append))
    outcome = in_thread(lambda: worker.embed(["text"]))
    assert engines[0].hanging.wait(10)
    worker.close()
    assert isinstance(outcome(), WorkerClosed)
