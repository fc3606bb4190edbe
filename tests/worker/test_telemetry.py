"""One span and the GenAI metrics for each request, and not a word of anybody's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llama_worker import (
    ContextOverflowError,
    GenerationError,
    LlamaWorker,
    Message,
    QueueFull,
    UnsupportedFeatureError,
    WorkerConfig,
    _telemetry,
)
from llama_worker._engine.base import DecodeStatus
from llama_worker._telemetry import flush
from llama_worker.testing import Fault, Gate, fake_loader, fake_worker

SECRET = "the harbour at night"
EXPORTER = InMemorySpanExporter()
READER = InMemoryMetricReader()


@pytest.fixture(scope="module", autouse=True)
def providers() -> None:
    """The application's, which can be set once in a process."""
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(tracing)
    metrics.set_meter_provider(MeterProvider([READER]))


@pytest.fixture(autouse=True)
def empty(providers: None) -> None:
    assert flush(10)
    EXPORTER.clear()


def spans() -> list[ReadableSpan]:
    """What has ended so far. Whoever has its answer finds its span here."""
    assert flush(10)
    return list(EXPORTER.get_finished_spans())


def points(name: str, **wanted: Any) -> list[Any]:
    """The data points of one metric whose attributes are `wanted`."""
    assert flush(10)
    data = READER.get_metrics_data()
    found = (
        []
        if data is None
        else [
            (metric, point)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]
    )
    keys = {key.replace("__", "."): value for key, value in wanted.items()}
    return [point for _, point in found if keys.items() <= dict(point.attributes).items()]


def total(name: str, **wanted: Any) -> tuple[int, float]:
    found = points(name, **wanted)
    return sum(point.count for point in found), sum(point.sum for point in found)


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[LlamaWorker]:
    """Its model has the test's name, so that its metrics are told apart from other tests'."""
    with fake_worker("Well, hello there.", model=f"fake://{request.node.originalname}") as worker:
        yield worker


def test_a_chat_is_one_span_with_what_the_conventions_ask_for(worker: LlamaWorker) -> None:
    prompt = [Message(role="user", content=SECRET)]
    reply = worker.generate(prompt, max_tokens=50, temperature=0.5, top_k=7, seed=3, stop=[SECRET])
    (span,) = spans()
    name = "test_a_chat_is_one_span_with_what_the_conventions_ask_for"
    assert span.name == f"chat {name}"
    assert span.kind is trace.SpanKind.INTERNAL
    assert span.status.is_ok or span.status.status_code is trace.StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llama_worker",
        "gen_ai.request.model": name,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.95,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": reply.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": reply.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert SECRET not in span.to_json()
    assert reply.text not in span.to_json()


def test_the_metrics_of_the_conventions(worker: LlamaWorker) -> None:
    model = {"gen_ai__request__model": "test_the_metrics_of_the_conventions"}
    replies = [worker.generate("Hello", max_tokens=8), worker.generate("Hello you", max_tokens=5)]
    usages = [reply.usage for reply in replies]
    assert total("gen_ai.client.operation.duration", **model)[0] == 2
    assert total("gen_ai.server.time_to_first_token", **model)[0] == 2
    assert total("gen_ai.server.time_per_output_token", **model)[0] == 2
    assert total("gen_ai.client.token.usage", gen_ai__token__type="input", **model) == (
        2,
        sum(usage.prompt_tokens for usage in usages),
    )
    assert total("gen_ai.client.token.usage", gen_ai__token__type="output", **model) == (
        2,
        sum(usage.completion_tokens for usage in usages),
    )
    (point,) = points("gen_ai.client.operation.duration", **model)
    assert point.explicit_bounds[0] == 0.01
    assert dict(point.attributes)["gen_ai.operation.name"] == "text_completion"


def test_embeddings_have_input_tokens_only(worker: LlamaWorker) -> None:
    worker.embed([SECRET, "another"])
    (span,) = spans()
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.operation.name"] == "embeddings"
    assert attributes["gen_ai.usage.input_tokens"] == worker.metrics().embedded_tokens
    assert "gen_ai.usage.output_tokens" not in attributes
    model = {"gen_ai__request__model": "test_embeddings_have_input_tokens_only"}
    assert total("gen_ai.client.token.usage", **model) == (1, worker.metrics().embedded_tokens)
    assert SECRET not in span.to_json()


async def test_spans_are_children_of_the_callers(worker: LlamaWorker) -> None:
    tracer = trace.get_tracer("test")
    with tracer.start_as_current_span("sync") as sync:
        worker.generate("Hello", max_tokens=2)
        list(worker.stream("Hello", max_tokens=2))
        worker.embed(["Hello"])
    with tracer.start_as_current_span("async") as native:
        await worker.agenerate("Hello", max_tokens=2)
        assert [event async for event in worker.astream("Hello", max_tokens=2)]
        await worker.aembed(["Hello"])
    ours = [span for span in spans() if span.name not in ("sync", "async")]
    parents = [span.parent.span_id for span in ours if span.parent is not None]
    assert parents == [sync.get_span_context().span_id] * 3 + [native.get_span_context().span_id] * 3
    assert all(span.start_time <= (span.end_time or 0) for span in ours)


def test_a_cancelled_request_ends_its_span_without_an_error(worker: LlamaWorker) -> None:
    stream = worker.stream("Hello", max_tokens=2000, ignore_eos=True)
    stream.close()
    assert list(stream)
    (span,) = spans()
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert "error.type" not in attributes


def test_what_the_engine_fails_is_an_error() -> None:
    loader = fake_loader(faults=[Fault("decode", DecodeStatus.COMPUTE_FAILED, nth=2)])
    with fake_worker(loader=loader, model="fake://failing") as worker, pytest.raises(GenerationError):
        worker.generate("Hello", max_tokens=5, ignore_eos=True)
    (span,) = spans()
    assert dict(span.attributes or {})["error.type"] == "GenerationError"
    assert span.status.status_code is trace.StatusCode.ERROR
    (point,) = points("gen_ai.client.operation.duration", gen_ai__request__model="failing")
    assert dict(point.attributes)["error.type"] == "GenerationError"
    assert total("gen_ai.server.time_to_first_token", gen_ai__request__model="failing") == (0, 0)


async def test_what_is_never_accepted_has_a_span_too() -> None:
    gate = Gate()
    config = WorkerConfig(queue_size=1, on_full="reject")
    with fake_worker(loader=fake_loader(gate=gate), worker_config=config, n_ctx=256, n_parallel=1) as worker:
        with pytest.raises(ContextOverflowError):
            worker.generate(SECRET * 100, max_tokens=1)
        with pytest.raises(ContextOverflowError):
            await worker.agenerate(SECRET * 100, max_tokens=1)
        gate.shut()
        first = worker.stream("Hello", max_tokens=1)
        gate.wait_reached()
        second = worker.stream("Hello", max_tokens=1)
        with pytest.raises(QueueFull):
            worker.embed([SECRET])
        gate.open()
        assert list(first)
        assert list(second)
    with fake_worker(loader=fake_loader(embedding=True)) as embedder, pytest.raises(UnsupportedFeatureError):
        embedder.generate(SECRET)
    errors = [dict(span.attributes or {}).get("error.type") for span in spans()]
    assert errors == [
        "ContextOverflowError",
        "ContextOverflowError",
        "QueueFull",
        None,
        None,
        "UnsupportedFeatureError",
    ]
    assert SECRET not in "".join(span.to_json() for span in EXPORTER.get_finished_spans())


def test_a_broken_exporter_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    reporter, seen = _telemetry._reporter, []
    reporter.start()
    reporter.add(lambda: 1 // 0)
    reporter.add(lambda: seen.append("next"))
    assert flush(10)
    assert seen == ["next"]
    assert "could not be reported" in caplog.text


@pytest.mark.parametrize("blocked", [False, True])
def test_opentelemetry_is_neither_needed_nor_imported_before_its_time(blocked: bool) -> None:
    code = f"""
import sys
if {blocked}:
    sys.modules["opentelemetry"] = None
import llama_worker
from llama_worker.testing import fake_worker
assert {blocked} or "opentelemetry" not in sys.modules
with fake_worker("Hi.") as worker:
    assert worker.generate("Hello").text == "Hi."
    assert len(worker.embed(["Hello"])) == 1
assert {blocked} or "opentelemetry.trace" in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
