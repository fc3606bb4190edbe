"""When the caller's side tries again, and how long it waits before."""

import time
from collections.abc import Iterator

import pytest

from langchain_llama_worker import ChatLlamaWorker
from langchain_llama_worker._retry import RetryPolicy
from llama_worker import GenerationError, LlamaWorker, ModelConfig, QueueFull, WorkerClosed, WorkerConfig, WorkerDied
from llama_worker import _registry as registry
from llama_worker.testing import Fault, fake_loader


class Attempts:
    """Fails with each of `errors` in turn, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.n = 0

    def __call__(self) -> str:
        self.n += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def later(self) -> str:
        return self()


def test_a_worker_that_is_started_anew_is_waited_for() -> None:
    attempts, began = Attempts(WorkerDied("broke"), WorkerDied("again", retry_after=0.4)), time.monotonic()
    assert RetryPolicy(2, restarts=True).run(attempts) == "done"
    assert time.monotonic() - began >= 0.4


async def test_the_async_twin_waits_too() -> None:
    attempts, began = Attempts(WorkerDied("again", retry_after=0.4)), time.monotonic()
    assert await RetryPolicy(2, restarts=True).arun(attempts.later) == "done"
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize(
    ("error", "restarts"),
    [
        (WorkerDied("for long", retry_after=50.0), True),
        (WorkerDied("not the registry's"), False),
        (WorkerClosed(), True),
        (GenerationError("broken"), True),
    ],
)
def test_what_a_second_attempt_cannot_mend_is_raised_at_once(error: Exception, restarts: bool) -> None:
    attempts = Attempts(error)
    with pytest.raises(type(error)):
        RetryPolicy(5, restarts=restarts).run(attempts)
    assert attempts.n == 1


def test_the_last_error_is_raised_when_the_attempts_are_used_up() -> None:
    attempts = Attempts(QueueFull(1), QueueFull(2), QueueFull(3))
    with pytest.raises(QueueFull, match="2 requests"):
        RetryPolicy(1, restarts=True).run(attempts)


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModelConfig]]:
    """The registry's workers die of their first request, but for every third. Lists those that were started."""
    started = list[ModelConfig]()

    def begin(config: ModelConfig, behaviour: WorkerConfig) -> LlamaWorker:
        started.append(config)
        faults = [] if len(started) % 3 == 0 else [Fault("decode", RuntimeError("broken"))]
        return LlamaWorker.begin(config, behaviour, loader=fake_loader("answer", faults=faults))

    monkeypatch.setattr(registry, "_registry", registry.Registry(begin))
    yield started
    registry.close_all()


def test_a_model_whose_worker_dies_is_started_anew_within_one_call(mortal: list[ModelConfig]) -> None:
    chat, began = ChatLlamaWorker(model="fake://model", max_retries=3), time.monotonic()
    assert chat.invoke("hello").text == "answer"
    assert len(mortal) == 3
    assert time.monotonic() - began >= 0.5  # between the first restart and the second
    assert chat.invoke("hello").text == "answer"
    assert len(mortal) == 3


async def test_the_same_on_an_event_loop(mortal: list[ModelConfig]) -> None:
    chat = ChatLlamaWorker(model="fake://model", max_retries=3)
    assert (await chat.ainvoke("hello")).text == "answer"
    assert len(mortal) == 3


def test_without_retries_the_death_is_the_callers(mortal: list[ModelConfig]) -> None:
    chat = ChatLlamaWorker(model="fake://model", max_retries=0)
    for _ in range(2):
        with pytest.raises(WorkerDied):
            chat.invoke("hello")
    with pytest.raises(WorkerDied, match="restarts within") as refused:
        chat.invoke("hello")
    assert 0.0 < (refused.value.retry_after or 0.0) <= 0.5
    assert len(mortal) == 2
