"""Each engine call x each way to fail: nobody hangs, the stream rule holds, the books stay right."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from llama_worker import (
    ConfigError,
    DeadlineExceeded,
    EngineVersionError,
    Failed,
    Finished,
    GenerationError,
    InsufficientMemoryError,
    InvalidRequestError,
    LlamaWorker,
    LlamaWorkerError,
    Message,
    ModelConfig,
    ModelLoadError,
    SamplingParams,
    WorkerClosed,
    WorkerDied,
)
from llama_worker._engine.base import DecodeStatus, LoadedModel, TokenIds
from llama_worker.testing import (
    ByteTokenizer,
    FakeEngine,
    Fault,
    Gate,
    assert_well_formed,
    fake_loader,
    fake_worker,
)
from llama_worker.testing._sampler import FakeSampler
from tests.worker.waiting import in_thread, wait_until

STATES = ["seq_save", "seq_restore"]
CALLS = ["decode", "sample", "logits", "new_sampler", "seq_end", "seq_trim", "seq_clear", "seq_share", "embed", "close"]
CALLS += STATES
PROMPTS = [[Message(role="user", content="s" * 200 + f" question {i}")] for i in range(6)]


BREAKS = [RuntimeError("the engine broke"), MemoryError("no memory is left")]


@pytest.mark.parametrize(("call", "nth", "broken"), list(itertools.product(CALLS, [1, 2, 5], BREAKS)), ids=str)
def test_an_engine_that_raises_hangs_nobody(call: str, nth: int, broken: Exception):
    """Everyone is answered: in order, or with WorkerDied whose cause is what the engine raised."""
    loader = fake_loader(faults=[Fault(call, broken, nth)], hybrid=call in STATES)  # type: ignore[arg-type]
    worker = fake_worker(loader=loader, n_ctx=1024, n_parallel=2)
    outcomes = run_everything(worker)
    worker.close()
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert all(isinstance(failure, WorkerClosed) for failure in failures), failures
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
        assert engines[0].hanging.wait(60)
        for stream in streams:
            stream.close()
        ends = [assert_well_formed(list(stream)) for stream in streams]
        assert [end.reason for end in ends if isinstance(end, Finished)] == ["cancelled", "cancelled"]
        assert worker.generate(PROMPTS[2], max_tokens=4, ignore_eos=True).usage.completion_tokens == 4


@pytest.mark.parametrize("nth", [1, 2])
def test_an_embedding_that_does_not_return_ends_at_its_deadline(nth: int):
    engines: list[FakeEngine] = []
    with fake_worker(loader=fake_loader(faults=[Fault("embed", "hang", nth)], seen=engines.append)) as worker:
        for _ in range(nth - 1):
            worker.embed(["before"])
        while not engines[0].hanging.is_set():  # a deadline that passes before the call shows nothing
            with pytest.raises(DeadlineExceeded):
                worker.embed(["now"], timeout=0.05)
        assert len(worker.embed(["afterwards"])) == 1


@pytest.mark.parametrize("call", ["sample", "logits", "new_sampler"])
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
    """Six chats, two of them async, and two embeddings at once; what each ended with, within the test's timeout."""

    def chat(prompt: list[Message]) -> object:
        stream = worker.stream(prompt, max_tokens=12, logprobs=1)  # type: ignore[attr-defined]
        end = assert_well_formed(list(stream))
        return end.error if isinstance(end, Failed) else end

    def achat(prompt: list[Message]) -> object:
        return asyncio.run(worker.agenerate(prompt, max_tokens=12))  # type: ignore[attr-defined]

    def embed(i: int) -> object:
        return worker.embed([f"text {i}", "another"])  # type: ignore[attr-defined]

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(outcome, partial(chat, prompt)) for prompt in PROMPTS[:4]]
        jobs += [pool.submit(outcome, partial(achat, prompt)) for prompt in PROMPTS[4:]]
        jobs += [pool.submit(outcome, partial(embed, i)) for i in range(2)]
        return [job.result(timeout=60) for job in jobs]


def outcome(task: Callable[[], object]) -> object:
    try:
        return task()
    except Exception as exc:  # noqa: BLE001  it is what the table is about
        return exc


def test_closing_ends_an_embedding_that_does_not_return_with_worker_closed():
    engines: list[FakeEngine] = []
    worker = fake_worker(loader=fake_loader(faults=[Fault("embed", "hang")], seen=engines.append))
    outcome = in_thread(lambda: worker.embed(["text"]))
    assert engines[0].hanging.wait(60)
    worker.close()
    assert isinstance(outcome(), WorkerClosed)


# -- with a reload among them -----------------------------------------------------------------------


@pytest.mark.parametrize(("call", "nth", "overlap"), list(itertools.product(CALLS, [1, 4], [False, True])))
def test_an_engine_that_raises_around_a_reload_hangs_nobody(call: str, nth: int, overlap: bool):
    """Both engines have the fault. Callers end in order or with a typed error, and so does the reload."""
    broken = RuntimeError("the engine broke")
    loader = fake_loader(faults=[Fault(call, broken, nth)], hybrid=call in STATES)  # type: ignore[arg-type]
    worker = fake_worker(loader=loader, n_ctx=1024, n_parallel=2)
    callers = in_thread(lambda: run_everything(worker))
    reloaded = in_thread(lambda: worker.reload(n_ctx=2048, overlap=overlap))
    outcomes = [*callers(), reloaded()]
    worker.close()
    assert all(isinstance(end, WorkerClosed) for end in outcomes if isinstance(end, Exception))
    assert worker.status().state in ("closed", "dead")


# -- what the loader does ---------------------------------------------------------------------------

LOAD_FAULTS: list[BaseException] = [
    ModelLoadError("no tensors"),
    ModelLoadError("no context of n_ctx=4096 could be made"),
    InsufficientMemoryError("too large", needed=2, available=1),
    EngineVersionError("too new"),
    ConfigError("type_k", "q8_0", "unknown here"),
    OSError("disk on fire"),
    MemoryError("no memory is left"),
    ValueError("the engine broke"),
    SystemExit(3),
    KeyboardInterrupt(),
]


def failing_loader(fault: BaseException, *failing: int) -> Callable[[ModelConfig], LoadedModel]:
    """A loader whose loads number `failing`, from 1, raise `fault`."""
    numbers, load = itertools.count(1), fake_loader()

    def loader(config: ModelConfig) -> LoadedModel:
        if next(numbers) in failing:
            raise fault
        return load(config)

    return loader


@pytest.mark.parametrize("fault", LOAD_FAULTS, ids=repr)
def test_a_first_load_that_fails_is_heard_by_everyone_who_waits_for_it(fault: BaseException):
    """The error itself when it is one of ours, else one of ours that names it."""
    held = threading.Event()

    def loader(config: ModelConfig) -> LoadedModel:
        assert held.wait(60)
        raise fault

    worker = LlamaWorker.begin(ModelConfig(model="fake://model"), loader=loader)
    callers = in_thread(lambda: run_everything(worker))
    reloaded = in_thread(lambda: worker.reload(n_ctx=2048))
    wait_until(lambda: worker._service.change is not None and worker._service.change.command is not None)
    held.set()
    ends = [*callers(), reloaded()]
    worker.close()
    if not isinstance(fault, LlamaWorkerError):
        assert all(isinstance(end, ModelLoadError | WorkerDied) for end in ends), ends
    assert all(isinstance(end, LlamaWorkerError) for end in ends), ends
    assert worker.is_closed


@pytest.mark.parametrize(("fault", "overlap"), list(itertools.product(LOAD_FAULTS, [False, True])), ids=repr)
def test_a_reload_that_cannot_load_leaves_the_former_model_in_service(fault: BaseException, overlap: bool):
    with fake_worker(loader=failing_loader(fault, 2), n_ctx=4096, n_parallel=2) as worker:
        before = worker.generate(PROMPTS[0], max_tokens=8).text
        callers = in_thread(lambda: run_everything(worker))
        with pytest.raises(ModelLoadError) as failed:
            worker.reload(n_ctx=2048, overlap=overlap)
        assert failed.value.previous_restored
        assert not [end for end in callers() if isinstance(end, Exception)]
        assert worker.generate(PROMPTS[0], max_tokens=8).text == before
        assert worker.n_ctx == 4096


@pytest.mark.parametrize("fault", LOAD_FAULTS, ids=repr)
def test_a_worker_that_lost_both_models_refuses_with_the_reason_until_it_is_mended(fault: BaseException):
    with fake_worker(loader=failing_loader(fault, 2, 3), n_ctx=4096, n_parallel=2) as worker:
        with pytest.raises(ModelLoadError) as failed:
            worker.reload(n_ctx=2048)
        assert not failed.value.previous_restored
        assert worker.status().state == "unloaded"
        assert [type(end) for end in run_everything(worker)] == [ModelLoadError] * 8
        worker.reload(n_ctx=1024)
        assert not [end for end in run_everything(worker) if isinstance(end, Exception)]


# -- what belongs to one engine: its owner, its samplers, its embedding context ---------------------


class Unadoptable(FakeEngine):
    """It cannot be taken over from the thread that loaded it."""

    def adopt(self) -> None:
        raise MemoryError("no memory is left")


class Sticky(FakeSampler):
    def close(self) -> None:
        raise RuntimeError("the sampler cannot be freed")


class StickySamplers(FakeEngine):
    """Its samplers cannot be freed."""

    def new_sampler(self, params: SamplingParams, history: TokenIds) -> FakeSampler:
        made = super().new_sampler(params, history)
        return Sticky(made.script, made.ignore_eos)


def loader_of(engine: type[FakeEngine], engines: list[FakeEngine]) -> Callable[[ModelConfig], LoadedModel]:
    def load(config: ModelConfig) -> LoadedModel:
        loaded = fake_loader()(config)
        engines.append(engine(loaded.engine.limits))
        return replace(loaded, engine=engines[-1])

    return load


def test_an_engine_that_cannot_be_taken_over_is_what_the_constructor_raises():
    with pytest.raises(WorkerDied) as died:
        fake_worker(loader=loader_of(Unadoptable, []))
    assert isinstance(died.value.__cause__, MemoryError)


def test_a_sampler_that_cannot_be_freed_hangs_nobody_and_repeats_no_last_word():
    engines: list[FakeEngine] = []
    worker = fake_worker(loader=loader_of(StickySamplers, engines), n_ctx=1024, n_parallel=2)
    ends = run_everything(worker)
    worker.close()
    assert any(isinstance(end, Finished) for end in ends)
    assert all(isinstance(end, WorkerDied) for end in ends if isinstance(end, Exception))
    assert engines[0].closed, "the engine is freed whatever became of the samplers"


@pytest.mark.parametrize("error", [ModelLoadError("no context for embeddings"), GenerationError("rc -2")], ids=repr)
def test_an_embedding_context_that_cannot_be_made_fails_those_requests_alone(error: Exception):
    with fake_worker(loader=fake_loader(faults=[Fault("embed", error)])) as worker:
        with pytest.raises(type(error), match=str(error)):
            worker.embed(["first"])
        assert len(worker.embed(["second"])) == 1
        assert worker.generate("third", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4


# -- preparing --------------------------------------------------------------------------------------


class Tokenizer(ByteTokenizer):
    """Cannot tokenize what has "broken" in it."""

    fault: Exception | None = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool, after: int | None = None) -> TokenIds:
        if self.fault is not None and "broken" in text:
            raise self.fault
        return super().tokenize(text, add_special=add_special, parse_special=parse_special, after=after)


TOKEN_FAULTS: list[Exception] = [
    InvalidRequestError("text", "<text>", "it is no valid Unicode"),
    MemoryError("no memory is left"),
    RuntimeError("the tokenizer broke"),
]


@pytest.fixture(params=TOKEN_FAULTS, ids=repr)
def token_fault(request: pytest.FixtureRequest) -> Iterator[Exception]:
    yield request.param
    Tokenizer.fault = None


def tokenizing_loader(gate: Gate) -> Callable[[ModelConfig], LoadedModel]:
    load = fake_loader(gate=gate)
    return lambda config: replace(load(config), vocabulary=Tokenizer())


def test_a_text_that_cannot_be_tokenized_fails_its_own_call(token_fault: Exception):
    with fake_worker(loader=tokenizing_loader(Gate())) as worker:
        Tokenizer.fault = token_fault
        calls: list[Callable[[], object]] = [
            lambda: worker.generate("broken"),
            lambda: worker.stream([Message(role="user", content="broken")]),
            lambda: worker.embed(["fine", "broken"]),
            lambda: worker.count_tokens("broken"),
            lambda: asyncio.run(worker.agenerate("broken")),
            lambda: asyncio.run(worker.aembed(["broken"])),
        ]
        assert [outcome(call) for call in calls] == [token_fault] * len(calls)
        assert worker.generate("fine", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4


def test_a_text_that_the_next_model_cannot_tokenize_fails_alone(token_fault: Exception):
    """It was waiting while the model was changed, and is prepared again for the new one."""
    gate = Gate()
    with fake_worker(loader=tokenizing_loader(gate), n_ctx=4096, n_parallel=1) as worker:
        gate.shut()
        running = in_thread(lambda: worker.generate("running", max_tokens=4, ignore_eos=True))
        gate.wait_reached()
        texts = ["fine", "broken", "fine too"]
        waiting = [in_thread(lambda t=t: worker.generate(t, max_tokens=4, ignore_eos=True)) for t in texts]
        vectors = in_thread(lambda: worker.embed(["broken"]))
        wait_until(lambda: sum((s := worker.status()).waiting + s.queued for _ in [0]) == 4)
        reloaded = in_thread(lambda: worker.reload(n_ctx=2048))
        wait_until(lambda: worker._channel.has_controls)
        Tokenizer.fault = token_fault
        gate.open()
        assert reloaded() is None
        ends = [running(), *[join() for join in waiting], vectors()]
        assert [end if isinstance(end, Exception) else None for end in ends] == [
            None, None, token_fault, None, token_fault,
        ]  # fmt: skip
        assert worker.status().state == "ready"
