"""What a worker counts is what it did, and asking never waits."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_worker import (
    ConfigError,
    Distribution,
    Failed,
    Finished,
    LlamaWorker,
    Metrics,
    ModelConfig,
    ModelLoadError,
    QueueFull,
    Usage,
    WorkerConfig,
)
from llama_worker._channel import Ticket
from llama_worker._engine.base import DecodeStatus, LoadedModel, Loader
from llama_worker._health import SLOW_STEP, health_of
from llama_worker._meter import Histogram
from llama_worker._metrics import BOUNDS
from llama_worker._snapshots import cache_metrics_of, metrics_of
from llama_worker.testing import Fault, Gate, fake_loader, fake_worker
from tests.worker.bench import Bench, ListSink
from tests.worker.waiting import in_thread, wait_until

WORDS = "the quick brown fox jumps over the lazy dog and runs away "


class Ticking:
    """An engine whose decodes take `seconds` of the bench's clock."""

    def __init__(self, inner: Any, bench: list[Bench], seconds: float) -> None:
        self._inner = inner
        self._bench = bench
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def decode(self, spans: Any) -> DecodeStatus:
        self._bench[0].now += self._seconds
        status: DecodeStatus = self._inner.decode(spans)
        return status


def ticking_bench(seconds: float, *replies: str, **config: Any) -> Bench:
    benches: list[Bench] = []
    load: Loader = fake_loader(*replies)

    def slow(config: ModelConfig) -> LoadedModel:
        model = load(config)
        return replace(model, engine=Ticking(model.engine, benches, seconds))

    benches.append(Bench(loader=slow, **config))
    return benches[0].load()


def ask_many(bench: Bench, n: int) -> list[ListSink]:
    sinks = []
    for i in range(n):
        sink, cancel = bench.ask(WORDS * (1 + i % 3) + str(i % 7), max_tokens=1 + i % 9, deadline=None if i % 5 else 4)
        sinks.append(sink)
        bench.step(i % 4)
        if i % 6 == 5:
            cancel.cancel()
        if i == n // 2:
            bench.now = 5.0  # every deadline that is still to come has passed
    return sinks


def assert_counted(metrics: Metrics, sinks: list[ListSink]) -> None:
    """The counters are, to the token, the sums over the terminal events."""
    events = [sink.terminal for sink in sinks]
    usages = [event.usage for event in events]
    assert metrics.prompt_tokens == sum(u.prompt_tokens for u in usages)
    assert metrics.completion_tokens == sum(u.completion_tokens for u in usages)
    assert metrics.cached_tokens == sum(u.cached_tokens for u in usages)
    assert metrics.finished == Counter(e.reason for e in events if isinstance(e, Finished))
    assert metrics.failed == Counter(type(e.error).__name__ for e in events if isinstance(e, Failed))
    assert metrics.accepted == metrics.answered == len(sinks)


# -- what is counted


def test_tokens_are_the_sums_over_all_terminal_events() -> None:
    """Finished for every reason, cancelled, past the deadline, failed by the engine, closed: all at once."""
    faults = [Fault("decode", DecodeStatus.COMPUTE_FAILED, nth=30), Fault("sample", ModelLoadError("broken"), nth=50)]
    bench = Bench(loader=fake_loader("A short one.", "And a longer reply here.", faults=faults)).load()
    sinks = [*ask_many(bench, 60), bench.ask(WORDS, max_tokens=9)[0]]
    bench.shut_down()
    assert_counted(metrics_of(bench.service), sinks)
    reasons = {event.reason for sink in sinks if isinstance(event := sink.terminal, Finished)}
    errors = {type(event.error).__name__ for sink in sinks if isinstance(event := sink.terminal, Failed)}
    assert reasons >= {"length", "cancelled"}
    assert errors >= {"DeadlineExceeded", "GenerationError", "ModelLoadError", "WorkerClosed"}


@pytest.mark.parametrize("call", ["decode", "sample", "new_sampler"])
def test_each_request_counts_once_when_the_worker_dies(call: Any) -> None:
    loader = fake_loader(faults=[Fault(call, RuntimeError("the engine broke"), nth=2)])
    worker = fake_worker(loader=loader, worker_config=WorkerConfig(queue_size=32), n_parallel=2)
    streams = [worker.stream(WORDS + str(i), max_tokens=40) for i in range(2)]
    events = [list(stream)[-1] for stream in streams]
    metrics = worker.metrics()
    assert metrics.answered == metrics.accepted == len(events)
    assert metrics.failed.get("WorkerDied", 0) == sum(isinstance(e, Failed) for e in events) > 0


def test_texts_are_counted_with_their_tokens() -> None:
    bench = Bench(loader=fake_loader(embedding=True)).load()
    done, _ = bench.embed("one", "three")
    bench.settle(done)
    gone, cancel = bench.embed("never")
    cancel.cancel()
    bench.settle(gone)
    metrics = metrics_of(bench.service)
    view = bench.published.current
    assert view is not None
    tokens = sum(len(text) for text in view.prepare_embedding(_texts("one", "three")).texts)
    assert (metrics.embeds, metrics.embedded_texts, metrics.embedded_tokens) == (1, 2, tokens)
    assert metrics.embeds_failed == {"GenerationCancelled": 1}
    assert metrics.answered == metrics.accepted == 2


def _texts(*texts: str) -> Any:
    from llama_worker import EmbedRequest

    return EmbedRequest(texts=texts)


def test_who_reads_an_answer_finds_it_counted() -> None:
    with fake_worker("Hi.") as worker:
        for n in range(1, 101):
            worker.generate("Hello", max_tokens=3)
            assert sum(worker.metrics().finished.values()) == n
            worker.embed(["Hello"])
            assert worker.metrics().embeds == n


def test_what_the_channel_refuses_is_counted_apart() -> None:
    gate = Gate()
    config = WorkerConfig(queue_size=1, on_full="reject")
    with fake_worker(loader=fake_loader(gate=gate), worker_config=config, n_parallel=1) as worker:
        gate.shut()
        held = [worker.stream("Hello", max_tokens=1)]
        gate.wait_reached()
        held.append(worker.stream("Hello", max_tokens=1))
        with pytest.raises(QueueFull):
            worker.stream("Hello", max_tokens=1)
        assert (worker.metrics().refused, worker.metrics().accepted) == (1, len(held))
        gate.open()
        for stream in held:
            assert isinstance(list(stream)[-1], Finished)
        assert worker.metrics().answered == len(held)


def test_a_request_that_waits_through_a_reload_counts_once() -> None:
    bench = Bench("Hello there.", n_parallel=1).load()
    sinks = [bench.ask(WORDS + str(i), max_tokens=5)[0] for i in range(4)]
    bench.step(2)
    done = bench.reload(model="fake://other")
    bench.settle(done.answer, *sinks)
    assert_counted(metrics_of(bench.service), sinks)
    assert metrics_of(bench.service).reloads == 1


def test_reloads_that_fail_are_counted() -> None:
    def load(config: ModelConfig) -> LoadedModel:
        if config.model == "fake://broken":
            raise ModelLoadError("it is broken")
        return fake_loader("Hi.")(config)

    with fake_worker(loader=load) as worker:
        with pytest.raises(ModelLoadError):
            worker.reload(model="fake://broken")
        assert (worker.metrics().reloads, worker.metrics().reloads_failed) == (0, 1)
        worker.reload(model="fake://other")
        assert (worker.metrics().reloads, worker.metrics().reloads_failed) == (1, 1)


def test_aborts_full_caches_and_preemptions_are_counted() -> None:
    seen: list[Any] = []
    faults = [Fault("decode", DecodeStatus.ABORTED, nth=3), Fault("decode", DecodeStatus.KV_FULL, nth=5)]
    bench = Bench(loader=fake_loader(faults=faults, seen=seen.append), n_kv_cells=128, n_ctx=128, n_parallel=3).load()
    bench.engines = seen
    sinks = [bench.ask(WORDS[: 20 + i], max_tokens=60, ignore_eos=True)[0] for i in range(3)]
    bench.settle(*sinks)
    metrics = metrics_of(bench.service)
    assert_counted(metrics, sinks)
    assert metrics.aborts == metrics.decode_errors["aborted"] == 1
    assert metrics.decode_errors["kv_full"] >= 1
    assert metrics.kv_recoveries >= 1
    assert metrics.preemptions >= 1


def test_rows_are_those_that_the_engine_computed() -> None:
    bench = Bench(n_parallel=2).load()
    sinks = [bench.ask(WORDS * 3 + str(i), max_tokens=8, ignore_eos=True)[0] for i in range(3)]
    bench.settle(*sinks)
    metrics = metrics_of(bench.service)
    assert metrics.rows == bench.engine.n_rows
    # The last token of each reply is never decoded, and a first token follows from the prompt's last row.
    assert metrics.decode_tokens == metrics.completion_tokens - len(sinks)
    assert metrics.decodes == metrics.step_time.count == bench.engine.calls.count("decode")
    assert metrics.steps == bench.service.n_steps
    assert (metrics.preemptions, metrics.kv_recoveries, metrics.aborts, metrics.decode_errors) == (0, 0, 0, {})


def test_a_preempted_reply_is_prefilled_again() -> None:
    """Its tokens are rows of a prompt then, and the last of them is not decoded alone."""
    bench = Bench(n_kv_cells=128, n_ctx=128, n_ubatch=16, n_parallel=2).load()
    sinks = [bench.ask(WORDS[:27] + str(i), max_tokens=50, ignore_eos=True)[0] for i in range(2)]
    bench.settle(*sinks)
    metrics = metrics_of(bench.service)
    assert metrics.preemptions >= 1
    assert metrics.rows == bench.engine.n_rows
    assert metrics.decode_tokens == metrics.completion_tokens - len(sinks) - metrics.preemptions


# -- times


def test_times_are_those_of_the_clock() -> None:
    """One request, one decode of 2 s for its prompt and three for its tokens, begun 7 s after it was submitted."""
    bench = ticking_bench(2.0)
    request = bench.request("Hello", max_tokens=4, ignore_eos=True)
    bench.now += 7.0
    bench.put(request)
    assert isinstance(request.sink, ListSink)
    bench.settle(request.sink)
    metrics = metrics_of(bench.service)
    assert (metrics.queue_wait.sum, metrics.queue_wait.count) == (7.0, 1)
    assert (metrics.time_to_first_token.sum, metrics.time_to_first_token.count) == (9.0, 1)
    assert (metrics.inter_token.sum, metrics.inter_token.count) == (6.0, 3)
    assert (metrics.step_time.sum, metrics.step_time.count) == (8.0, 4)
    assert metrics.decode_rate == 0.5
    assert metrics.prefill_rate == metrics.prompt_tokens / 2.0
    assert metrics.step_time.mean == 2.0
    assert request.record.inter_token == 2.0


def test_a_mixed_step_counts_for_both_rates() -> None:
    bench = ticking_bench(1.0, n_parallel=2)
    first, _ = bench.ask("Hello", max_tokens=6, ignore_eos=True)
    bench.step(2)
    second, _ = bench.ask("Goodbye", max_tokens=2, ignore_eos=True)
    bench.settle(first, second)
    metrics = metrics_of(bench.service)
    assert metrics.decodes == 6
    assert (metrics.prefill_seconds, metrics.decode_seconds) == (2.0, 5.0)


@given(st.lists(st.floats(min_value=0, max_value=900), min_size=1, max_size=60), st.floats(min_value=0, max_value=1))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(times: list[float], q: float) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.add(seconds)
    distribution = histogram.snapshot()
    rank = max(1, next(n for n in range(len(times) + 1) if n >= q * len(times)))
    true = sorted(times)[rank - 1]
    found = distribution.quantile(q)
    assert found is not None
    low = max((bound for bound in (0.0, *BOUNDS) if bound < true), default=0.0)
    high = min((bound for bound in BOUNDS if bound >= true), default=BOUNDS[-1])
    assert low <= found <= high
    assert distribution.count == len(times)
    assert distribution.mean == pytest.approx(sum(times) / len(times))


def test_nothing_observed_is_none_and_a_quantile_is_a_share() -> None:
    assert Distribution().quantile(0.5) is None
    assert Distribution().mean is None
    with pytest.raises(ValueError, match="share"):
        Distribution().quantile(50)


# -- asking


def test_no_snapshot_waits_for_a_step() -> None:
    gate = Gate()
    with fake_worker(loader=fake_loader(gate=gate)) as worker:
        gate.shut()
        stream = worker.stream(WORDS, max_tokens=2)
        gate.wait_reached()
        ask = in_thread(lambda: (worker.metrics(), worker.cache_metrics(), worker.health(), worker.diagnostics()))
        metrics, cache, health, _ = ask()
        assert (metrics.accepted, metrics.answered) == (1, 0)
        assert (cache.idle, health.verdict) == (cache.slots - 1, "healthy")
        gate.open()
        assert isinstance(list(stream)[-1], Finished)


def test_snapshots_are_consistent_while_the_worker_counts() -> None:
    """Each request is equal, so tokens and answers have one ratio, in every snapshot ever taken."""
    with fake_worker("Well.") as worker:
        stop = threading.Event()

        def look() -> int:
            n, last = 0, worker.metrics()
            while not stop.is_set():
                now = worker.metrics()
                assert now.prompt_tokens == now.answered * 6  # and BOS
                assert now.completion_tokens == now.answered * 5
                assert now.answered <= now.accepted
                assert (now.answered, now.decodes, now.step_time.count) >= (last.answered, last.decodes, 0)
                n, last = n + 1, now
            return n

        looking = [in_thread(look) for _ in range(2)]
        for _ in range(150):
            worker.generate("Hello", max_tokens=9)
        stop.set()
        assert all(join() > 0 for join in looking)
        assert worker.metrics().answered == 150


def test_the_cache_says_what_is_used_shared_and_reused() -> None:
    bench = Bench(n_parallel=3, n_ctx=512).load()
    assert cache_metrics_of(bench.service).reuse_ratio is None
    first, _ = bench.ask(WORDS * 2 + "one", max_tokens=20, ignore_eos=True)
    bench.step(2)
    second, _ = bench.ask(WORDS * 2 + "two", max_tokens=20, ignore_eos=True)
    bench.step(2)
    cache = cache_metrics_of(bench.service)
    common = first_common(WORDS * 2 + "one", WORDS * 2 + "two")
    assert (cache.slots, cache.idle, cache.kept) == (3, 1, 0)
    assert cache.shared == cache.reused_tokens == common
    assert cache.used == bench.engine.cells_used
    bench.settle(first, second)
    done = cache_metrics_of(bench.service)
    assert (done.idle, done.kept, done.evictions) == (3, 2, 0)
    assert done.prompt_tokens == first.terminal.usage.prompt_tokens + second.terminal.usage.prompt_tokens
    assert done.reuse_ratio == common / done.prompt_tokens


def first_common(one: str, two: str) -> int:
    return next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b) + 1  # and BOS


def test_evictions_are_counted() -> None:
    bench = Bench(n_parallel=3, n_ctx=128, n_kv_cells=128, n_ubatch=32).load()
    for i in range(4):
        sink, _ = bench.ask(f"{i}" + WORDS, max_tokens=8, ignore_eos=True)
        bench.settle(sink)
    cache = cache_metrics_of(bench.service)
    assert cache.evictions >= 1
    assert cache.evicted_tokens >= cache.evictions
    assert cache.used <= cache.cells == 128


# -- health


def test_health_of_a_worker_from_loading_to_its_end() -> None:
    bench = Bench()
    assert health_of(bench.service).verdict == "degraded"
    assert "loading" in health_of(bench.service).reason
    bench.load()
    assert (health_of(bench.service).verdict, health_of(bench.service).reason) == ("healthy", "")
    assert health_of(bench.service).since_step is None
    sink, _ = bench.ask("Hello", max_tokens=2)
    bench.settle(sink)
    assert "fork()" in health_of(bench.service, inherited=True).reason
    assert not health_of(bench.service, inherited=True).is_serving
    bench.now += 12.0
    assert health_of(bench.service).since_step == 12.0
    bench.shut_down()
    health = health_of(bench.service)
    assert (health.verdict, health.state, health.is_serving) == ("unhealthy", "closed", False)


def test_a_slow_step_and_a_full_queue_degrade() -> None:
    gate = Gate()
    config = WorkerConfig(queue_size=1)
    with fake_worker(loader=fake_loader(gate=gate), worker_config=config, n_parallel=1) as worker:
        gate.shut()
        first = worker.stream("Hello", max_tokens=1)
        gate.wait_reached()
        joins = [in_thread(lambda: worker.generate("Hello", max_tokens=1)) for _ in range(3)]
        wait_until(lambda: worker.status().callers_waiting)
        health = worker.health()
        assert (health.verdict, health.is_serving) == ("degraded", True)
        assert "wait for room" in health.reason
        service = worker._service
        moment = service.clock()
        service.clock = lambda: moment + 2 * SLOW_STEP
        assert "one step" in worker.health().reason
        gate.open()
        assert isinstance(list(first)[-1], Finished)
        assert all(join().finish_reason for join in joins)
    assert worker.health().verdict == "unhealthy"


def test_a_worker_without_a_model_says_why() -> None:
    answers = iter([True, False, False])

    def load(config: ModelConfig) -> LoadedModel:
        if not next(answers):
            raise ModelLoadError("no tensors")
        return fake_loader()(config)

    with fake_worker(loader=load) as worker:
        with pytest.raises(ModelLoadError):
            worker.reload(model="fake://other")
        health = worker.health()
        assert (health.verdict, health.state) == ("unhealthy", "unloaded")
        assert "no tensors" in health.reason


# -- diagnostics


def test_diagnostics_are_json_without_paths_or_texts(tmp_path: Path) -> None:
    secret, folder = "the harbour at night", tmp_path / "somebody" / "models"
    with fake_worker(secret, model=str(folder / "m.gguf"), chat_template=f"{{# {secret} #}}hello") as worker:
        assert worker.generate(secret, max_tokens=100).text == secret
        said = json.dumps(worker.diagnostics())
        assert secret not in said
        assert "somebody" not in said
        found = json.loads(said)
        assert found["model_config"]["model"] == "m.gguf"
        assert found["model_config"]["chat_template"] == f"<{len(secret) + 11} characters>"
        assert found["model"]["architecture"] == "fake"
        assert found["metrics"]["finished"] == {"stop": 1}
        assert found["packages"]["llama-cpp-python"]
        assert found["health"]["verdict"] == "healthy"


def test_diagnostics_of_a_failure_name_no_folder(tmp_path: Path) -> None:
    answers = iter([True, False, False])

    def load(config: ModelConfig) -> LoadedModel:
        if not next(answers):
            raise ModelLoadError(f"cannot read {tmp_path}/somebody/x.gguf")
        return fake_loader()(config)

    with fake_worker(loader=load) as worker:
        with pytest.raises(ModelLoadError):
            worker.reload(model="fake://other")
        said = json.dumps(worker.diagnostics())
        assert "x.gguf" in said
        assert "somebody" not in said
        assert worker.diagnostics()["model"] is None


# -- warming up, and changing a running worker


async def test_warming_up_answers_one_small_request() -> None:
    with fake_worker() as worker:
        assert worker.warmup() > 0
        assert await worker.awarmup() > 0
        metrics = worker.metrics()
        assert (metrics.finished, metrics.completion_tokens) == ({"length": 2}, 4)
    with fake_worker(loader=fake_loader(embedding=True)) as embedder:
        assert embedder.warmup() > 0
        assert await embedder.awarmup() > 0
        assert embedder.metrics().embeds == 2


@pytest.mark.engine
def test_warming_up_and_counting_on_real_models(tiny_llama: Path, tiny_bert: Path) -> None:
    with LlamaWorker(ModelConfig(model=str(tiny_llama), n_threads=1, n_ctx=256)) as worker:
        assert worker.warmup() > 0
        replies = [worker.generate([{"role": "user", "content": f"tell {i}"}], max_tokens=6, seed=1) for i in range(3)]
        metrics = worker.metrics()
        usages = [reply.usage for reply in replies]
        assert metrics.completion_tokens == sum(u.completion_tokens for u in usages) + 2
        assert metrics.cached_tokens >= sum(u.cached_tokens for u in usages) > 0
        assert metrics.decode_rate
        assert metrics.time_to_first_token.count == 4
        assert json.dumps(worker.diagnostics())
    with LlamaWorker(ModelConfig(model=str(tiny_bert), n_threads=1)) as worker:
        assert worker.warmup() > 0
        assert (worker.metrics().embeds, worker.metrics().embedded_texts) == (1, 1)


def test_a_longer_queue_lets_waiting_callers_in() -> None:
    gate = Gate()
    config = WorkerConfig(queue_size=1)
    with fake_worker(loader=fake_loader(gate=gate), worker_config=config, n_parallel=1) as worker:
        gate.shut()
        first = worker.stream("Hello", max_tokens=1)
        gate.wait_reached()
        joins = [in_thread(lambda: worker.generate("Hello", max_tokens=1)) for _ in range(4)]
        wait_until(lambda: worker.status().callers_waiting == 3)
        worker.reconfigure(queue_size=3)
        assert (worker.status().queued, worker.status().callers_waiting) == (3, 1)
        worker.reconfigure(queue_size=1, on_full="reject")
        with pytest.raises(QueueFull, match="1 requests wait"):
            worker.generate("Hello", max_tokens=1)
        assert worker.status().queued == 3  # nobody who waits already is dropped
        gate.open()
        assert isinstance(list(first)[-1], Finished)
        assert all(join().finish_reason for join in joins)
        assert worker.diagnostics()["worker_config"]["on_full"] == "reject"


def test_a_shorter_queue_fills_up_no_more() -> None:
    bench = Bench(capacity=3).load()
    queued = [bench.request("Hello") for _ in range(3)]
    for request in queued:
        bench.put(request)
    ticket = Ticket(bench.request("Hello"), lambda: None)
    bench.channel.offer(ticket)
    bench.channel.resize(1)
    for request in queued[:2]:
        bench.channel.drop(request)
        assert not ticket.accepted
    bench.channel.drop(queued[2])
    assert ticket.accepted


def test_a_budget_is_kept_from_the_next_step_on() -> None:
    with fake_worker() as worker:
        worker.reconfigure(step_budget_ms=7)
        service = worker._service
        assert service.loaded is not None
        assert service.loaded.scheduler.pace.budget_ms == 7
        worker.reload(n_ctx=512)
        assert service.loaded.scheduler.pace.budget_ms == 7


def test_an_idle_worker_hears_of_its_new_keep_alive() -> None:
    with fake_worker("Hi.") as worker:
        worker.generate("Hello")
        worker.reconfigure(keep_alive=0.0)
        wait_until(lambda: worker.status().state == "unloaded")
        assert worker.health().verdict == "healthy"  # the next request loads it again
        assert worker.cache_metrics().cells == 0
        assert worker.generate("Hello").text == "Hi."
        assert worker.metrics().finished == {"stop": 2}


@pytest.mark.parametrize(
    "changes", [{"queue_size": 0}, {"on_full": "explode"}, {"queue": 3}, {"contain_crashes": True}]
)
def test_what_cannot_be_changed_changes_nothing(changes: dict[str, Any]) -> None:
    with fake_worker() as worker:
        with pytest.raises(ConfigError) as caught:
            worker.reconfigure(step_budget_ms=7.0, **changes)
        assert caught.value.field == next(iter(changes))
        assert worker._service.step_budget_ms == 100.0


def test_an_answer_said_twice_counts_once() -> None:
    bench = Bench().load()
    request = bench.request("Hello")
    request.fail(ModelLoadError("first"))
    request.fail(ModelLoadError("second"))
    assert metrics_of(bench.service).failed == {"ModelLoadError": 1}
    assert Usage() == request.sink.events[0].usage  # type: ignore[attr-defined]
