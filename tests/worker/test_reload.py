"""Reload: those who run are finished, those who wait run on the new model, and a failure costs nothing."""

import asyncio
import gc
import threading
from collections.abc import Callable

import pytest

from llama_worker import (
    ConfigError,
    DeadlineExceeded,
    Finished,
    GenerationCancelled,
    InvalidRequestError,
    LlamaWorker,
    Message,
    ModelConfig,
    ModelLoadError,
    WorkerClosed,
    WorkerConfig,
    cancel_scope,
)
from llama_worker._engine.base import LoadedModel
from llama_worker._engine.llama import load as load_llama
from llama_worker._engine.progress import LoadProgress, current_progress, watched_by
from llama_worker._progress_bar import progress_bar
from llama_worker.testing import FakeEngine, Gate, fake_loader, fake_worker
from tests.worker.bench import Bench
from tests.worker.waiting import in_thread, until, wait_until

CHAT = [Message(role="user", content="hello")]


def test_running_requests_are_finished_and_waiting_ones_run_on_the_new_model():
    bench = Bench("a long enough answer", n_parallel=1).load()
    running, _ = bench.ask(CHAT, max_tokens=100)
    waiting, _ = bench.ask(CHAT, max_tokens=100)
    bench.step(2)
    old = bench.engine
    reload = bench.reload(n_ctx=512)
    queued, _ = bench.ask(CHAT, max_tokens=100)
    bench.settle(running)
    assert not waiting.events, "nobody new is let in while the old model is drained"
    bench.settle(waiting, queued)
    assert reload.answer.result(0) is None
    assert old.closed
    assert [sink.text for sink in (running, waiting, queued)] == ["a long enough answer"] * 3
    assert bench.published.view().n_ctx == 512
    assert len(bench.engines) == 2


def test_now_cancels_what_runs():
    bench = Bench(n_parallel=1).load()
    running, _ = bench.ask("a", max_tokens=1000, ignore_eos=True)
    waiting, _ = bench.ask("b", max_tokens=3, ignore_eos=True)
    bench.step(3)
    bench.reload(when="now")
    bench.settle(running, waiting)
    assert isinstance(running.terminal, Finished)
    assert running.terminal.reason == "cancelled"
    assert isinstance(waiting.terminal, Finished)
    assert waiting.terminal.reason == "length"


def test_a_preempted_request_is_drained_too():
    bench = Bench(n_ctx=256, n_parallel=3).load()
    sinks = [bench.ask(f"{i}" * 60, max_tokens=100, ignore_eos=True)[0] for i in range(3)]
    while not any(g.has_begun for g in bench.scheduler.waiting):
        bench.step()
    bench.reload(n_ctx=512)
    bench.settle(*sinks)
    assert [sink.terminal.usage.completion_tokens for sink in sinks] == [100, 100, 100]


def test_a_request_that_no_longer_fits_fails_alone():
    bench = Bench(n_ctx=4096, n_parallel=1).load()
    running, _ = bench.ask("a", max_tokens=4)
    too_long, _ = bench.ask("b" * 1000, max_tokens=4)
    fits, _ = bench.ask("c" * 10, max_tokens=4)
    bench.reload(n_ctx=256)
    bench.settle(running, too_long, fits)
    assert type(getattr(too_long.terminal, "error", None)).__name__ == "ContextOverflowError"
    assert isinstance(fits.terminal, Finished)


def test_embeddings_wait_through_a_reload():
    bench = Bench().load()
    answers = [bench.embed(f"text {i}")[0] for i in range(3)]
    bench.reload(n_ctx=1024)
    bench.settle(*answers)
    assert [len(answer.result(0)) for answer in answers] == [1, 1, 1]


def test_a_model_that_cannot_be_loaded_leaves_the_old_one_serving():
    bench = Bench(loader=picky_loader()).load()
    failed = bench.reload(model="fake://broken")
    bench.step(3)
    error = failed.answer.exception(0)
    assert isinstance(error, ModelLoadError)
    assert error.previous_restored
    sink, _ = bench.ask(CHAT)
    bench.settle(sink)
    assert sink.text == "answer"


def test_unloaded_is_a_living_state_that_a_reload_mends():
    """The old model is gone too: requests are refused with the reason, and the next reload serves again."""
    loads = iter([True, False, False, True])
    bench = Bench(loader=picky_loader(lambda: next(loads))).load()
    failed = bench.reload(model="fake://other")
    bench.step(3)
    assert not failed.answer.exception(0).previous_restored  # type: ignore[union-attr]
    assert bench.service.state == "unloaded"
    with pytest.raises(ModelLoadError):
        bench.published.view(0)
    mended = bench.reload(model="fake://third")
    bench.step(3)
    assert mended.answer.result(0) is None
    sink, _ = bench.ask(CHAT)
    bench.settle(sink)
    assert sink.text == "answer"


def test_reload_changes_the_named_fields_only():
    with fake_worker("answer", n_ctx=1024, n_parallel=2) as worker:
        worker.reload(n_ctx=2048)
        assert (worker.config.n_ctx, worker.config.n_parallel) == (2048, 2)
        worker.reload(ModelConfig(model="fake://other"))
        assert (worker.info.name, worker.config.n_parallel) == ("other", 4)
        assert worker.status().epoch == 3
        with pytest.raises(ConfigError) as error:
            worker.reload(n_ctx=-5)
        assert error.value.field == "n_ctx"
        with pytest.raises(ConfigError, match="unknown"):
            worker.reload(n_ctxx=5)


async def test_areload_does_not_block_the_loop_and_survives_its_tasks_cancellation():
    gate = Gate()
    with fake_worker(loader=fake_loader("answer", gate=gate)) as worker:
        gate.shut()
        running = asyncio.create_task(worker.agenerate("hello"))
        await asyncio.to_thread(gate.wait_reached)
        reload = asyncio.create_task(worker.areload(n_ctx=512))
        await until(lambda: worker._channel.has_controls or worker.status().state != "ready")
        reload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reload
        gate.open()
        assert (await running).text == "answer"
        await until(lambda: worker.status().epoch == 2)
        assert (await worker.agenerate("again")).text == "answer"
        assert worker.n_ctx == 512


async def test_how_a_reload_ended_that_nobody_waits_for_is_no_news_to_the_event_loop():
    """Else asyncio complains some time later that an exception was never retrieved."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    loader = HeldLoader()
    with fake_worker(loader=loader) as worker:
        reload = asyncio.create_task(worker.areload("fake://broken", overlap=True))
        await asyncio.to_thread(loader.reached.wait, 10)
        reload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reload
        loader.go.set()
        while not worker.metrics().reloads_failed:
            await asyncio.sleep(0)
    for _ in range(3):  # what the other thread had called soon
        await asyncio.sleep(0)
    gc.collect()
    assert not complaints


def test_reload_under_load_loses_nothing():
    """Eight threads ask on while the model is reloaded ten times: every answer is whole."""
    with fake_worker("the whole answer", n_parallel=3) as worker:
        outcomes = [in_thread(lambda: [worker.generate(CHAT).text for _ in range(25)]) for _ in range(8)]
        for i in range(10):
            worker.reload(n_ctx=1024 + 256 * i)
        assert [outcome() for outcome in outcomes] == [["the whole answer"] * 25] * 8
        assert worker.status().epoch == 11


def test_a_closed_worker_refuses_to_reload():
    worker = fake_worker("answer")
    worker.close()
    with pytest.raises(WorkerClosed):
        worker.reload(n_ctx=512)


def test_closing_in_the_middle_of_a_reload_answers_it():
    gate = Gate()
    worker = fake_worker(loader=fake_loader("answer", gate=gate))
    gate.shut()
    stream = worker.stream("hello")
    gate.wait_reached()
    reload = in_thread(lambda: worker.reload(n_ctx=512))
    wait_until(lambda: worker._channel._controls)
    closing = in_thread(worker.close)
    gate.open()
    closing()
    assert reload() is None or isinstance(reload(), WorkerClosed)
    assert list(stream)


def picky_loader(succeeds=None):
    """Loads what is not called broken, or as `succeeds` says."""
    inner = fake_loader("answer")
    engines: list[FakeEngine] = []

    def load(config: ModelConfig) -> LoadedModel:
        if not (succeeds() if succeeds else "broken" not in config.model):
            raise ModelLoadError(f"{config.model} cannot be loaded")
        loaded = inner(config)
        engines.append(loaded.engine)  # type: ignore[arg-type]
        return loaded

    return load


def test_a_template_that_does_not_compile_is_a_model_that_cannot_be_loaded():
    with pytest.raises(ModelLoadError, match="template"):
        fake_worker(chat_template="{% for %}")
    with fake_worker("answer") as worker:
        with pytest.raises(ModelLoadError) as error:
            worker.reload(chat_template="{% for %}")
        assert error.value.previous_restored
        assert worker.generate(CHAT).text == "answer"


def test_reload_takes_a_path_and_refuses_what_it_does_not_know():
    with fake_worker("answer") as worker:
        worker.reload("fake://other")
        assert worker.info.name == "other"
        with pytest.raises(InvalidRequestError, match="when"):
            worker.reload(n_ctx=512, when="later")  # type: ignore[arg-type]


def test_now_cancels_embeddings_that_have_begun():
    bench = Bench().load()
    answer, _ = bench.embed(*[f"text {i}" * 20 for i in range(40)])
    bench.step(2)
    bench.reload(when="now")
    bench.settle(answer)
    assert isinstance(answer.exception(0), GenerationCancelled)


class HeldLoader:
    """A loader whose second and later loads wait until they are let go, or not wanted any more."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.inner = fake_loader("answer")
        self.loads = 0

    def __call__(self, config: ModelConfig) -> LoadedModel:
        self.loads += 1
        if self.loads == 1:
            return self.inner(config)
        progress = current_progress()
        self.reached.set()
        while not self.go.wait(0.01):
            if not progress.tell(0.5):
                raise ModelLoadError("not wanted")
        if "broken" in config.model:
            raise ModelLoadError(f"{config.model} cannot be loaded")
        return self.inner(config)


def test_with_overlap_the_old_model_serves_until_the_new_one_is_there():
    loader = HeldLoader()
    with fake_worker(loader=loader) as worker:
        reload = in_thread(lambda: worker.reload("fake://other", overlap=True))
        assert loader.reached.wait(60)
        assert [worker.generate(CHAT).model for _ in range(3)] == ["model"] * 3
        loader.go.set()
        assert reload() is None
        assert worker.generate(CHAT).model == "other"


def test_with_overlap_a_failure_costs_the_old_model_nothing():
    loader = HeldLoader()
    loader.go.set()
    with fake_worker(loader=loader) as worker:
        with pytest.raises(ModelLoadError, match="broken") as error:
            worker.reload("fake://broken", overlap=True)
        assert error.value.previous_restored
        assert (worker.status().epoch, loader.loads) == (1, 2), "the old model was never let go"
        assert worker.generate(CHAT).text == "answer"


def test_who_waits_while_a_model_is_loaded_is_answered_when_his_time_is_up():
    loader = HeldLoader()
    with fake_worker(loader=loader) as worker:
        reload = in_thread(lambda: worker.reload("fake://other"))
        assert loader.reached.wait(60)
        late, cancelled = worker.stream(CHAT, timeout=0.05), worker.stream(CHAT)
        patient = worker.stream(CHAT)
        with pytest.raises(DeadlineExceeded):
            late.reply()
        cancelled.close()
        with pytest.raises(GenerationCancelled):
            cancelled.reply()
        assert worker.status().state == "loading"
        loader.go.set()
        assert reload() is None
        assert patient.reply().text == "answer"


def test_closing_ends_a_load():
    loader = HeldLoader()
    worker = fake_worker(loader=loader)
    reload = in_thread(lambda: worker.reload("fake://other"))
    assert loader.reached.wait(60)
    worker.close()
    assert isinstance(reload(), WorkerClosed)


def test_a_later_reload_supersedes_one_that_is_still_loading():
    loader = HeldLoader()
    with fake_worker(loader=loader) as worker:
        first = in_thread(lambda: worker.reload("fake://first"))
        assert loader.reached.wait(60)
        second = in_thread(lambda: worker.reload("fake://second"))
        assert "superseded" in str(first())
        loader.go.set()
        assert second() is None
        assert worker.generate(CHAT).model == "second"


def test_progress_is_told_and_a_callback_that_fails_is_left_alone(tiny_llama):
    fractions: list[float] = []

    def failing(fraction: float) -> None:
        fractions.append(-fraction)
        raise RuntimeError("not my day")

    with LlamaWorker(ModelConfig(model=str(tiny_llama), n_ctx=256, n_threads=1)) as worker:
        worker.reload(n_ctx=512, progress=fractions.append)
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        fractions.clear()
        worker.reload(n_ctx=256, progress=failing)
        assert len(fractions) == 1
        assert worker.n_ctx == 256


def test_a_native_load_that_nobody_wants_ends_at_its_next_tensor(tiny_llama):
    progress = LoadProgress()
    progress.cancel()
    with pytest.raises(ModelLoadError, match="cancelled"), watched_by(progress):
        load_llama(ModelConfig(model=str(tiny_llama), n_ctx=256, n_threads=1))


def test_an_engine_belongs_to_the_thread_that_adopted_it(tiny_llama):
    engine = in_thread(lambda: load_llama(ModelConfig(model=str(tiny_llama), n_ctx=256, n_threads=1)).engine)()
    with pytest.raises(RuntimeError, match="thread"):
        engine.seq_clear(0)
    engine.adopt()
    engine.seq_clear(0)
    engine.close()


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_overlap_is_one_of_three(value):
    with fake_worker("answer") as worker, pytest.raises(InvalidRequestError, match="overlap"):
        worker.reload(n_ctx=512, overlap=value)


def test_an_idle_model_is_let_go_and_comes_back_when_it_is_asked_for():
    bench = Bench("answer").load()
    bench.service.keep_alive = 30.0
    first, _ = bench.ask(CHAT)
    bench.settle(first)
    bench.channel.nudge()
    bench.step()
    bench.now = 29.0
    bench.channel.nudge()
    bench.step()
    assert bench.service.loaded is not None
    bench.now = 31.0
    bench.step()
    assert bench.engine.closed
    assert bench.service.state == "unloaded"
    second, _ = bench.ask(CHAT)
    bench.settle(second)
    assert second.text == "answer"
    assert (len(bench.engines), bench.service.state, bench.service.epoch) == (2, "ready", 2)


def test_an_idle_model_that_cannot_come_back_is_tried_again_by_the_next_request():
    loads = iter([True, False, True])
    bench = Bench(loader=picky_loader(lambda: next(loads))).load()
    bench.service.keep_alive = 0.0
    bench.step()
    assert bench.service.state == "unloaded"
    refused, _ = bench.ask(CHAT)
    bench.settle(refused)
    assert isinstance(getattr(refused.terminal, "error", None), ModelLoadError)
    assert bench.service.state == "unloaded"
    bench.service.keep_alive = None
    answered, _ = bench.ask(CHAT)
    bench.settle(answered)
    assert answered.text == "answer"


def test_a_worker_with_keep_alive_frees_and_returns():
    engines: list[FakeEngine] = []
    loader = fake_loader("answer", seen=engines.append)
    with fake_worker(loader=loader, worker_config=WorkerConfig(keep_alive=0.0)) as worker:
        for n in range(1, 4):
            assert worker.generate(CHAT).text == "answer"
            wait_until(lambda: worker.status().state == "unloaded")
            assert all(engine.closed for engine in engines)
            assert len(engines) >= n


def test_who_came_first_is_served_first_although_he_is_prepared_again():
    bench = Bench(n_parallel=1).load()
    running, _ = bench.ask("a", max_tokens=2, ignore_eos=True)
    bench.step()
    stale, _ = bench.ask("b", max_tokens=2, ignore_eos=True)
    bench.reload(n_ctx=512)
    while bench.service.epoch == 1:
        bench.step()
    fresh, _ = bench.ask("c", max_tokens=2, ignore_eos=True)
    while not fresh.is_answered:
        assert not fresh.events or stale.is_answered, "a request that came later was begun first"
        bench.step()
    assert running.is_answered


def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch, capsys):
    assert progress_bar("model") is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("llama_worker._progress_bar._PATIENCE", 0.0)
    draw = progress_bar("model.gguf")
    assert draw is not None
    for fraction in (0.25, 0.5, 1.0):
        draw(fraction)
    assert "loading model.gguf" in capsys.readouterr().err


def test_the_worker_sleeps_while_a_model_is_loaded_for_who_waits():
    """A request that nobody can take yet must not keep the worker thread busy."""
    loader = HeldLoader()
    with fake_worker(loader=loader) as worker:
        reload = in_thread(lambda: worker.reload("fake://other"))
        assert loader.reached.wait(60)
        waiting = worker.stream(CHAT)
        channel, waits = worker._channel, []
        wait_for = channel._changed.wait_for
        channel._changed.wait_for = lambda *args: (waits.append(1), wait_for(*args))[1]  # type: ignore[method-assign]
        nudged = threading.Event()
        nudged.wait(0.3)
        assert len(waits) < 10
        loader.go.set()
        assert reload() is None
        assert waiting.reply().text == "answer"


def test_a_reload_that_supersedes_the_first_load_and_fails_brings_the_first_model():
    first, go = threading.Event(), threading.Event()
    inner = fake_loader("answer")

    def load(config: ModelConfig) -> LoadedModel:
        if "broken" in config.model:
            raise ModelLoadError("cannot be loaded")
        first.set()
        go.wait(60)
        return inner(config)

    worker = LlamaWorker.begin(ModelConfig(model="fake://model"), loader=load)
    assert first.wait(60)
    reload = in_thread(lambda: worker.reload("fake://broken"))
    wait_until(lambda: worker._service.change is not None and worker._service.change.command is not None)
    go.set()
    failed = reload()
    assert isinstance(failed, ModelLoadError)
    assert failed.previous_restored
    assert worker.generate(CHAT).model == "model"
    worker.close()


def test_the_state_is_ready_again_when_a_superseding_reload_fails():
    loads = iter([True, False])
    bench = Bench("answer", loader=picky_loader(lambda: next(loads))).load()
    running, _ = bench.ask(CHAT, max_tokens=100)
    bench.step(2)
    bench.reload(n_ctx=512)
    bench.step()
    assert bench.service.state == "draining"
    failed = bench.reload(n_ctx=1024, overlap=True)
    bench.settle(failed.answer, running)
    assert isinstance(failed.answer.exception(0), ModelLoadError)
    assert bench.service.state == "ready"


def test_changes_are_made_to_what_was_asked_for_last():
    seen: list[str] = []
    loads = iter([True, True, False, False, True])
    inner = picky_loader(lambda: next(loads))

    def load(config: ModelConfig) -> LoadedModel:
        seen.append(config.model)
        return inner(config)

    with fake_worker(loader=load, model="fake://a") as worker:
        worker.reload("fake://b")
        with pytest.raises(ModelLoadError):
            worker.reload("fake://c")
        worker.reload(n_parallel=2)
        assert seen == ["fake://a", "fake://b", "fake://c", "fake://b", "fake://b"]


class Later:
    """Loads when the test says so."""

    def __call__(self, run: Callable[[], None]) -> None:
        self.run = run

    def close(self) -> None:
        """Nothing runs on its own."""


@pytest.mark.parametrize(("seconds", "reason"), [(4.0, "stop"), (6.0, "cancelled")])
def test_overlap_gives_those_who_run_their_time_from_the_end_of_the_load(seconds: float, reason: str):
    bench = Bench("a long enough answer").load()
    bench.service.launch = later = Later()
    running, _ = bench.ask(CHAT, max_tokens=100)
    bench.reload(n_ctx=512, overlap=True, timeout=5.0)
    bench.step(3)
    bench.now = 100.0  # the load took that long
    later.run()
    bench.step()
    bench.now += seconds
    bench.settle(running)
    assert getattr(running.terminal, "reason", None) == reason


def test_embeddings_that_only_wait_are_not_begun_by_a_drain():
    bench = Bench().load()
    begun, _ = bench.embed(*[f"text {i}" * 20 for i in range(60)])
    bench.step(2)
    waiting, _ = bench.embed("short")
    bench.step()
    reload = bench.reload(n_ctx=512)
    first = bench.engine
    bench.settle(begun, waiting, reload.answer)
    assert first.closed
    assert len(waiting.result(0)) == 1


async def test_an_async_stream_keeps_its_worker():
    stream = fake_worker("answer").astream(CHAT)
    assert (await stream.reply()).text == "answer"


def test_who_waits_for_the_first_load_can_be_cancelled():
    go = threading.Event()
    inner = fake_loader("answer")

    def load(config: ModelConfig) -> LoadedModel:
        go.wait(60)
        return inner(config)

    worker = LlamaWorker.begin(ModelConfig(model="fake://model"), loader=load)
    asking = in_thread(lambda: worker.generate(CHAT))
    wait_until(lambda: len(worker._desk._everything._flags))
    worker.cancel_all()
    assert isinstance(asking(), GenerationCancelled)
    go.set()
    assert worker.generate(CHAT).text == "answer"
    worker.close()


async def test_a_task_that_waits_for_the_first_load_is_cancelled_by_its_scope_or_by_the_worker():
    go = threading.Event()
    inner = fake_loader("answer")

    def load(config: ModelConfig) -> LoadedModel:
        go.wait(60)
        return inner(config)

    worker = LlamaWorker.begin(ModelConfig(model="fake://model"), loader=load)
    with cancel_scope() as scope:
        in_scope = [asyncio.ensure_future(ask) for ask in (worker.agenerate(CHAT), worker.aembed(["text"]))]
    outside = asyncio.ensure_future(worker.agenerate(CHAT))
    await until(lambda: len(worker._desk._everything._flags) == 3)
    scope.cancel()
    for asking in in_scope:
        with pytest.raises(GenerationCancelled):
            await asking
    assert not outside.done()
    worker.cancel_all()
    with pytest.raises(GenerationCancelled):
        await outside
    go.set()
    assert (await worker.agenerate(CHAT)).text == "answer"
    await worker.aclose()


@pytest.mark.parametrize("stderr", [None, object()], ids=["none", "no stream"])
def test_a_stderr_that_is_no_stream_is_no_terminal(monkeypatch, stderr):
    monkeypatch.setattr("sys.stderr", stderr)
    assert progress_bar("model") is None
