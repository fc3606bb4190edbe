"""A step that does not end: it is aborted, and if that does not help the worker is given up and everyone answered."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from llama_worker import (
    Failed,
    Finished,
    GenerationError,
    LlamaWorker,
    Message,
    ModelConfig,
    WorkerConfig,
    WorkerDied,
)
from llama_worker._engine.base import DecodeStatus, Floats, LoadedModel, Span, TokenIds
from llama_worker._engine_calls import Abandoned, EngineCalls
from llama_worker._watchdog import Watch
from llama_worker.testing import FakeEngine, Fault, assert_well_formed, fake_loader, fake_worker
from tests.worker.bench import Bench
from tests.worker.waiting import in_thread, wait_until

HELLO = [Message(role="user", content="hello")]


# -- what is decided, with a clock moved by hand ----------------------------------------------------


def watched(step_timeout: float | None = 10.0) -> tuple[Bench, Watch]:
    bench = Bench("a reply of some length", n_ctx=1024, n_parallel=1).load()
    return bench, Watch(bench.service, threading.current_thread(), step_timeout)


def test_while_the_worker_rests_no_call_can_be_overdue_before_the_timeout():
    bench, watch = watched()
    assert watch.look() == 10
    bench.now = 1000
    assert watch.look() == 10


def test_without_a_timeout_only_news_wake_the_watchdog():
    bench, watch = watched(step_timeout=None)
    assert watch.look() is None
    bench.service.calls.begin(bench.now)
    bench.now = 1e6
    assert watch.look() is None
    assert not bench.engine.abort_flag.raised.is_set()


def test_the_next_look_is_when_the_running_call_would_be_overdue():
    bench, watch = watched()
    bench.now = 3
    bench.service.calls.begin(bench.now)
    bench.now = 7
    assert watch.look() == 6
    assert not bench.engine.abort_flag.raised.is_set()


def test_an_overdue_call_is_aborted_once_and_gets_as_long_again():
    bench, watch = watched()
    bench.service.calls.begin(bench.now)
    bench.now = 10
    assert watch.look() == 10
    assert bench.engine.abort_flag.raised.is_set()
    assert bench.service.calls.overdue == 10
    bench.engine.abort_flag.clear()
    bench.now = 15
    assert watch.look() == 5
    assert not bench.engine.abort_flag.raised.is_set()
    assert not bench.service.parked


def test_a_call_that_ends_after_it_was_aborted_is_forgotten_and_the_next_has_its_own_time():
    bench, watch = watched()
    bench.service.calls.begin(bench.now)
    bench.now = 10
    watch.look()
    bench.service.calls.end()
    bench.service.calls.begin(bench.now)
    assert bench.service.calls.overdue is None
    bench.now = 19
    assert watch.look() == 1
    bench.now = 25
    assert watch.look() == 10
    assert not bench.service.parked


def test_a_call_that_does_not_end_costs_the_worker_and_everyone_hears_of_it():
    bench, watch = watched()
    running, _ = bench.ask(HELLO, max_tokens=100, ignore_eos=True)
    bench.step(3)
    waiting, _ = bench.ask(HELLO)
    vectors, _ = bench.embed("a text")
    command = bench.reload()
    bench.service.calls.begin(bench.now)
    for bench.now in (10, 20):
        watch.look()
    errors = [sink.terminal.error for sink in (running, waiting) if isinstance(sink.terminal, Failed)]
    errors += [vectors.exception(0), command.answer.exception(0)]  # type: ignore[list-item]
    assert [type(error) for error in errors] == [WorkerDied] * 4
    assert len({id(error) for error in errors}) == 4, "frameworks write into what they catch"
    assert "within 20 s" in str(errors[0])
    assert bench.service.state == "dead"
    assert bench.service.parked
    assert bench.service.ended.done()
    assert not bench.engine.closed, "the engine belongs to the thread that is in it"
    assert watch.look() is None
    assert watch.is_over


def test_the_end_of_a_call_and_giving_it_up_exclude_each_other():
    for _ in range(300):
        calls, start, ends = EngineCalls(), threading.Barrier(2), []
        calls.begin(0.0)
        call = calls.current
        assert call is not None

        def give_up(calls=calls, call=call, start=start) -> bool:  # type: ignore[no-untyped-def]
            start.wait()
            return calls.abandon(call)

        given_up = in_thread(give_up)
        start.wait()
        try:
            calls.end()
            ends.append("returned")
        except Abandoned:
            ends.append("abandoned")
        assert ends == (["abandoned"] if given_up() else ["returned"])


def test_who_was_cancelled_in_an_overdue_step_hears_that_and_not_an_error():
    engines: list[FakeEngine] = []
    loader = fake_loader(faults=[Fault("decode", "hang", 3)], seen=engines.append)
    bench = Bench(loader=loader, n_ctx=1024, n_parallel=2).load()
    kept, _ = bench.ask(HELLO, ignore_eos=True)
    left, flag = bench.ask("another", ignore_eos=True)

    def interrupt() -> None:
        engines[0].hanging.wait(60)
        flag.cancelled = True  # in this very moment; its wake-up would abort the call itself
        calls = bench.service.calls
        assert calls.current is not None
        calls.interrupt(calls.current, engines[0].abort_flag.raise_, 10.0)

    interrupted = in_thread(interrupt)
    bench.settle(kept, left)
    assert interrupted() is None
    assert isinstance(kept.terminal, Failed)
    assert isinstance(kept.terminal.error, GenerationError)
    assert isinstance(left.terminal, Finished)
    assert left.terminal.reason == "cancelled"
    bench.settle(bench.ask(HELLO)[0])


# -- with a worker's thread -------------------------------------------------------------------------


IMPATIENT = WorkerConfig(step_timeout=0.5, queue_size=2)
"""Far longer than a step that only waits for a core."""


def test_a_step_that_hangs_fails_its_requests_and_the_worker_serves_on():
    loader = fake_loader(faults=[Fault("decode", "hang", 2), Fault("embed", "hang", 2)])
    with fake_worker(loader=loader, worker_config=IMPATIENT) as worker:
        with pytest.raises(GenerationError, match=r"step_timeout=0\.5 s"):
            worker.generate("first", max_tokens=8, ignore_eos=True)
        worker.embed(["one"])
        with pytest.raises(GenerationError, match=r"step_timeout=0\.5 s"):
            worker.embed(["two"])
        assert worker.generate("second", max_tokens=8, ignore_eos=True).usage.completion_tokens == 8
        assert worker.status().state == "ready"


class StuckEngine(FakeEngine):
    """Its decode and embed can be stuck: they look at no abort flag until `release`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sticks = False
        self.stuck = threading.Event()
        self.release = threading.Event()

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        self._stick()
        return super().decode(spans)

    def embed(self, texts: Sequence[TokenIds]) -> Floats:
        self._stick()
        return super().embed(texts)

    def _stick(self) -> None:
        if self.sticks:
            self.stuck.set()
            assert self.release.wait(30)
            self.abort_flag.clear()


@contextmanager
def stuck_worker() -> Iterator[tuple[LlamaWorker, StuckEngine]]:
    engines: list[StuckEngine] = []

    def load(config: ModelConfig) -> LoadedModel:
        loaded = fake_loader()(config)
        engines.append(StuckEngine(loaded.engine.limits))
        return LoadedModel(engine=engines[-1], vocabulary=loaded.vocabulary, info=loaded.info)

    worker = LlamaWorker(ModelConfig(model="fake://model", n_ctx=4096, n_parallel=2), IMPATIENT, loader=load)
    yield worker, engines[0]
    engines[0].release.set()
    worker._thread.join(60)


def test_everyone_is_answered_while_the_thread_is_stuck_and_nobody_again_when_it_comes_back():
    with stuck_worker() as (worker, engine):
        streams = [worker.stream(f"prompt {i}", max_tokens=400, ignore_eos=True) for i in range(4)]
        heads = [next(streams[0]), next(streams[1])]
        engine.sticks = True
        callers = [in_thread(lambda i=i: worker.generate(f"more {i}")) for i in range(6)]
        callers += [in_thread(lambda: worker.embed(["a text"])), in_thread(lambda: worker.reload(n_ctx=2048))]
        assert engine.stuck.wait(60)
        assert [type(join()) for join in callers] == [WorkerDied] * 8
        ends = [assert_well_formed([*heads[i : i + 1], *streams[i]]) for i in range(4)]
        assert [type(end.error) for end in ends if isinstance(end, Failed)] == [WorkerDied] * 4
        worker.close()
        assert worker._thread.is_alive()
        assert (worker.status().state, worker.status().running) == ("dead", 0)
        with pytest.raises(WorkerDied, match="although it was aborted"):
            worker.generate("too late")
        engine.release.set()
        worker._thread.join(60)
        assert not worker._thread.is_alive()
        assert engine.closed, "it came back after all, so its memory is not lost"
        assert [list(stream) for stream in streams] == [[]] * 4, "a second last word"


async def test_an_embedding_that_is_stuck_is_given_up_too_and_aclose_returns():
    with stuck_worker() as (worker, engine):
        engine.sticks = True
        with pytest.raises(WorkerDied):
            await worker.aembed(["a text"])
        await worker.aclose()
        assert worker._thread.is_alive()


def test_steps_that_are_quick_enough_are_left_alone():
    settings = WorkerConfig(step_timeout=30.0)
    with fake_worker(worker_config=settings) as worker, fake_worker() as other:
        ours, theirs = (w.generate("prompt", max_tokens=200, ignore_eos=True) for w in (worker, other))
        assert ours.text == theirs.text
        assert worker.status().aborts == 0


def test_a_worker_that_ended_is_watched_no_more():
    from llama_worker import _watchdog

    worker = fake_worker(worker_config=IMPATIENT)
    thread = worker._thread
    assert any(watch._thread is thread for watch in _watchdog._watchdog._watches)
    worker.close()
    wait_until(lambda: not any(watch._thread is thread for watch in _watchdog._watchdog._watches))


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_interpreter_leaves_at_once_although_a_thread_was_given_up():
    done = run("""
        import threading
        from llama_worker import WorkerConfig, WorkerDied
        from llama_worker.testing import FakeEngine, fake_worker

        FakeEngine.decode = lambda self, spans: threading.Event().wait()
        worker = fake_worker(worker_config=WorkerConfig(step_timeout=0.5))
        try:
            worker.generate("x")
        except WorkerDied:
            print("died")
    """)
    assert (done.returncode, done.stdout) == (0, "died\n"), done.stderr


def test_a_forked_child_has_a_watchdog_of_its_own():
    done = run("""
        import os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own about forking with threads
        from llama_worker import GenerationError, WorkerConfig
        from llama_worker.testing import Fault, fake_loader, fake_worker

        def ask():
            loader = fake_loader(faults=[Fault("decode", "hang")])
            with fake_worker(loader=loader, worker_config=WorkerConfig(step_timeout=0.5)) as worker:
                try:
                    worker.generate("x")
                except GenerationError:
                    return 0
            return 1

        ask()
        child = os.fork()
        if child == 0:
            os._exit(ask())
        print(os.waitpid(child, 0)[1])
    """)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_load_that_waits_behind_one_that_crashed_is_given_up_too():
    """Both are errands of one loader thread, and that is parked before the second has begun."""
    done = run("""
        import threading
        from llama_worker import LlamaWorker, ModelConfig, ModelLoadError, WorkerConfig
        from llama_worker._parking import park_if_guarded
        from llama_worker.testing import fake_loader

        crash, loading = threading.Event(), threading.Event()

        def load(config):
            if config.model == "fake://crash":
                loading.set()
                crash.wait()
                park_if_guarded("GGML_ASSERT(true)", strays=False)
            return fake_loader("answer")(config)

        def reload(model):
            try:
                worker.reload(model)
            except ModelLoadError as error:
                print(model, "superseded" in str(error) or "crashed" in str(error))

        worker = LlamaWorker(ModelConfig(model="fake://a"), WorkerConfig(contain_crashes=True), loader=load)
        first = threading.Thread(target=reload, args=("fake://crash",))
        first.start()
        loading.wait()
        second = threading.Thread(target=reload, args=("fake://b",))
        second.start()
        first.join()
        crash.set()
        second.join()
        print(worker.generate("x").text)
        worker.close()
    """)
    assert (done.returncode, done.stdout) == (0, "fake://crash True\nfake://b True\nanswer\n"), done.stderr


def test_a_model_that_crashes_whenever_it_is_loaded_is_not_tried_for_ever():
    done = run("""
        from llama_worker import LlamaWorker, ModelConfig, ModelLoadError, WorkerConfig, WorkerDied
        from llama_worker._parking import _lot, park_if_guarded
        from llama_worker._registry import Registry

        def load(config):
            park_if_guarded("GGML_ASSERT(true)", strays=False)

        registry = Registry(lambda *settings: LlamaWorker.begin(*settings, loader=load))
        for _ in range(8):
            try:
                registry.worker(ModelConfig(model="fake://a"), WorkerConfig(contain_crashes=True)).info
            except ModelLoadError as error:
                assert error.crashed
            except WorkerDied as error:
                assert error.retry_after > 0
        print(len(_lot.crashes))
    """)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 3
