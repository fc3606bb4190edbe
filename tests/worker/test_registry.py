"""The registry: one worker for each configuration, for as long as somebody uses it, and its restarts."""

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llama_worker import (
    LlamaWorker,
    ModelConfig,
    ModelLoadError,
    WorkerClosed,
    WorkerConfig,
    WorkerDied,
    close_all,
    get_handle,
    get_worker,
)
from llama_worker._engine.base import LoadedModel
from llama_worker._registry import Registry
from llama_worker._restarts import LIMIT, WITHIN, Restarts
from llama_worker.testing import FakeEngine, Fault, fake_limits, fake_loader, fake_worker
from tests.worker.resources import usage
from tests.worker.waiting import wait_until

CONFIG = ModelConfig(model="fake://model")
BEHAVIOUR = WorkerConfig()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Host:
    """A registry over fake engines, every one of which it remembers. `fault` is built into the next ones."""

    def __init__(self, clock: Clock) -> None:
        self.registry = Registry(self._begin, clock)
        self.engines: list[FakeEngine] = []
        self.load_error: Exception | None = None
        self.fault: type[Exception] | None = None

    def worker(self, config: ModelConfig = CONFIG) -> LlamaWorker:
        return self.registry.worker(config, BEHAVIOUR)

    def let_die(self) -> WorkerDied:
        """Start a worker, have it die, and let go of it."""
        with pytest.raises(WorkerDied) as caught:
            self.worker().generate("hello")
        return caught.value

    def refuses_for(self) -> float:
        """Seconds until the next worker may be started."""
        with pytest.raises(WorkerDied) as caught:
            self.worker()
        assert caught.value.retry_after is not None
        return caught.value.retry_after

    def _begin(self, config: ModelConfig, behaviour: WorkerConfig) -> LlamaWorker:
        return LlamaWorker.begin(config, behaviour, loader=self._load)

    def _load(self, config: ModelConfig) -> LoadedModel:
        if self.load_error is not None:
            raise self.load_error
        faults = [] if self.fault is None else [Fault("decode", self.fault("broken"))]
        return fake_loader("answer", faults=faults, seen=self.engines.append)(config)


@pytest.fixture
def host(clock: Clock) -> Iterator[Host]:
    host = Host(clock)
    yield host
    host.registry.close_all()


@pytest.fixture
def _no_gc() -> Iterator[None]:
    """What is freed here is freed by its last reference, and not by chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ended(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(60)
    return not any(thread.is_alive() for thread in threads)


# -- one worker for equal configurations ------------------------------------------------------------


def test_equal_configurations_share_one_worker(host: Host) -> None:
    worker = host.worker()
    assert host.worker(ModelConfig(model="fake://model", n_ctx=CONFIG.n_ctx)) is worker
    assert host.worker(ModelConfig(model="fake://model", n_ctx=99)) is not worker
    assert host.registry.worker(CONFIG, WorkerConfig(queue_size=9)) is not worker


def test_a_reload_does_not_change_what_a_worker_is_found_by(host: Host) -> None:
    other = ModelConfig(model="fake://other")
    worker = host.worker()
    worker.reload(other)
    assert worker.config == other
    assert host.worker() is worker
    assert host.worker(other) is not worker


def test_many_threads_that_ask_at_once_get_one_worker(host: Host) -> None:
    start, found = threading.Barrier(16), list[LlamaWorker]()

    def ask() -> None:
        start.wait()
        found.append(host.worker())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    assert ended(threads)
    assert len(set(map(id, found))) == 1
    assert found[0].generate("hello").text == "answer"
    assert len(host.engines) == 1


# -- as long as somebody uses it --------------------------------------------------------------------


@pytest.mark.usefixtures("_no_gc")
def test_a_worker_ends_with_its_last_user_and_the_next_one_loads_anew(host: Host) -> None:
    first, second = host.worker(), host.worker()
    thread = first._thread
    del first
    assert second.generate("hello").text == "answer"
    del second
    assert ended([thread])
    assert host.engines[0].closed
    assert host.worker().generate("hello").text == "answer"
    assert len(host.engines) == 2


@pytest.mark.usefixtures("_no_gc")
def test_a_stream_keeps_its_worker(host: Host) -> None:
    stream = host.worker().stream("hello")
    assert host.worker().status().state != "closed"
    assert stream.reply().text == "answer"
    assert len(host.engines) == 1


@pytest.mark.usefixtures("_no_gc")
def test_a_handle_keeps_its_worker_between_requests(host: Host) -> None:
    handle = host.registry.handle(CONFIG, BEHAVIOUR)
    assert handle.opened is None
    assert not host.engines
    for _ in range(3):
        assert handle.worker().generate("hello").text == "answer"
    assert host.worker() is handle.opened
    assert len(host.engines) == 1
    thread = handle.worker()._thread
    del handle
    assert ended([thread])
    assert host.engines[0].closed


@pytest.mark.usefixtures("_no_gc")
def test_fifty_rounds_of_users_that_come_and_go_leave_nothing(host: Host) -> None:
    before, threads = threading.active_count(), list[threading.Thread]()
    for n in range(50):
        handle = host.registry.handle(ModelConfig(model=f"fake://model-{n}"), BEHAVIOUR)
        assert handle.worker().generate("hello").text == "answer"
        threads.append(handle.worker()._thread)
        del handle
    assert ended(threads)
    assert all(engine.closed for engine in host.engines)
    assert len(host.engines) == 50
    assert len(host.registry) == 1  # the last one; the others were forgotten when the next one came
    assert threading.active_count() <= before + 1  # the postman is everybody's


def test_users_that_come_and_go_in_many_threads_are_all_served(host: Host) -> None:
    """Each drops its worker at once: whoever comes next finds it still alive, or a new one, never one that ends."""
    texts, start = list[str](), threading.Barrier(8)

    def come_and_go() -> None:
        start.wait()
        texts.extend([host.worker().generate("hello").text for _ in range(30)])

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert ended(threads)
    assert texts == ["answer"] * 240
    gc.collect()
    wait_until(lambda: all(engine.closed for engine in host.engines))


@pytest.mark.engine
@pytest.mark.usefixtures("_no_gc")
def test_fifty_models_that_come_and_go_cost_the_memory_of_one(tiny_llama: Path) -> None:
    config = ModelConfig(model=str(tiny_llama), n_ctx=4096, n_threads=1)
    taken = []
    for n in range(50):
        worker = get_worker(config)
        assert worker.generate("hello", max_tokens=1).usage.completion_tokens == 1
        thread = worker._thread
        del worker
        assert ended([thread])
        if n in (9, 49):
            taken.append(usage())
    first, last = taken
    assert last.rss - first.rss < 40  # MiB; forty of these models, left behind, would take 290
    assert last.threads < first.threads + 10
    assert last.files < first.files + 10


class SlowToFree(FakeEngine):
    """Takes its time to free its memory: until `may_go`."""

    def __init__(self, config: ModelConfig, may_go: threading.Event) -> None:
        super().__init__(fake_limits(config))
        self.may_go = may_go

    def close(self) -> None:
        self.may_go.wait(60)
        super().close()


@pytest.mark.engine
@pytest.mark.usefixtures("_no_gc")
def test_a_model_waits_for_the_memory_of_one_that_is_being_let_go(tiny_llama: Path) -> None:
    engines, may_go = list[SlowToFree](), threading.Event()

    def load(config: ModelConfig) -> LoadedModel:
        engines.append(SlowToFree(config, may_go))
        return replace(fake_loader()(config), engine=engines[0])

    dropped = fake_worker(loader=load)
    del dropped
    other = LlamaWorker.begin(ModelConfig(model=str(tiny_llama), n_threads=1))
    threading.Timer(0.3, may_go.set).start()  # far longer than this model takes to load
    assert other.info.n_vocab > 0
    assert engines[0].closed
    other.close()


# -- handles ----------------------------------------------------------------------------------------


def test_equal_configurations_share_one_handle_and_copies_are_it() -> None:
    handle = get_handle("/nowhere/model.gguf")
    assert get_handle("/nowhere/../nowhere/model.gguf") is handle
    assert copy.copy(handle) is handle
    assert copy.deepcopy([handle]) == [handle]
    assert pickle.loads(pickle.dumps(handle)) is handle
    assert get_handle("/nowhere/model.gguf", WorkerConfig(queue_size=9)) is not handle
    assert handle.opened is None


def test_a_handle_replaces_a_worker_that_was_closed(host: Host) -> None:
    handle = host.registry.handle(CONFIG, BEHAVIOUR)
    worker = handle.worker()
    worker.close()
    assert handle.worker().generate("hello").text == "answer"
    assert handle.worker() is not worker


# -- restarts ---------------------------------------------------------------------------------------


def test_the_first_restart_is_at_once_and_the_pauses_double(clock: Clock) -> None:
    restarts = Restarts(clock)
    delays = list[float]()
    for _ in range(LIMIT):
        delays.append(restarts.delay())
        clock.now += delays[-1]
        restarts.note()
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert restarts.delay() == pytest.approx(WITHIN - 7.5)  # until the first of them is long ago


def test_a_worker_that_served_for_a_while_is_restarted_at_once(clock: Clock) -> None:
    restarts = Restarts(clock)
    for _ in range(3):
        assert restarts.delay() == 0.0
        restarts.note()
        clock.now += 10.0
    clock.now += WITHIN
    assert len(restarts) == 0


def test_a_worker_that_died_is_replaced_less_and_less_often(host: Host, clock: Clock) -> None:
    host.fault = RuntimeError
    host.let_die()
    pauses = list[float]()
    for _ in range(LIMIT):
        host.let_die()
        pauses.append(host.refuses_for())
        clock.now += pauses[-1]
    assert pauses == [0.5, 1.0, 2.0, 4.0, WITHIN - 7.5]
    host.fault = None
    assert host.worker().generate("hello").text == "answer"
    assert len(host.engines) == 1 + LIMIT + 1


def test_the_refusal_says_why_until_when_and_what_to_do(host: Host, clock: Clock) -> None:
    host.fault = RuntimeError
    assert host.let_die().retry_after is None
    assert host.let_die().retry_after is None
    clock.now += 0.2
    said = r"fake://model.*RuntimeError.*1 of 5 restarts.*in 0\.3 s.*close_all"
    with pytest.raises(WorkerDied, match=said) as refused:
        host.worker()
    assert refused.value.retry_after == pytest.approx(0.3)
    assert isinstance(refused.value.__cause__, RuntimeError)


def test_close_all_starts_over(host: Host) -> None:
    host.fault = RuntimeError
    host.let_die()
    host.let_die()
    with pytest.raises(WorkerDied, match="close_all"):
        host.worker()
    host.fault = None
    host.registry.close_all()
    assert host.worker().generate("hello").text == "answer"


def test_a_handle_is_refused_like_anybody(host: Host, clock: Clock) -> None:
    host.fault = RuntimeError
    handle = host.registry.handle(CONFIG, BEHAVIOUR)
    for _ in range(2):
        with pytest.raises(WorkerDied):
            handle.worker().generate("hello")
    with pytest.raises(WorkerDied):
        handle.worker()
    host.fault = None
    clock.now += host.refuses_for()
    assert handle.worker().generate("hello").text == "answer"


def test_a_failed_load_is_no_death(host: Host) -> None:
    host.load_error = ModelLoadError("not today")
    for _ in range(2 * LIMIT):
        with pytest.raises(ModelLoadError, match="not today"):
            host.worker().generate("hello")
    host.load_error = None
    assert host.worker().generate("hello").text == "answer"


def test_a_loader_that_breaks_is_a_death(host: Host) -> None:
    host.load_error = ZeroDivisionError()
    host.let_die()
    host.let_die()
    with pytest.raises(WorkerDied, match="ZeroDivisionError") as refused:
        host.worker()
    assert refused.value.retry_after == 0.5


def test_closing_is_no_death(host: Host) -> None:
    for _ in range(2 * LIMIT):
        worker = host.worker()
        worker.close()
        with pytest.raises(WorkerClosed):
            worker.generate("hello")
    assert host.worker().generate("hello").text == "answer"


def test_the_death_of_one_configuration_does_not_concern_another(host: Host) -> None:
    host.fault = RuntimeError
    host.let_die()
    host.let_die()
    host.fault = None
    other = host.worker(ModelConfig(model="fake://other"))
    assert other.generate("hello").text == "answer"
    with pytest.raises(WorkerDied):  # and starting the other did not make it forgotten
        host.worker()


def test_close_all_closes_what_the_registry_gave() -> None:
    worker = get_worker("/nowhere/model.gguf")
    close_all()
    assert worker.is_closed
