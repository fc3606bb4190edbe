"""OpenTelemetry: one span and the GenAI metrics for each request, if the application has opentelemetry-api.

Names are those of the semantic conventions for generative AI. Never contents: no prompt, no reply, no stop
string. Spans are children of the span that is current where the request is submitted.

What exporters do when a span ends may take as long as it likes, so it is done by a thread of its own and
neither by the worker nor by the caller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from llama_worker import _exit
from llama_worker._background import Background
from llama_worker._events import Usage
from llama_worker._record import Answer, Listener, Record
from llama_worker._requests import EmbedRequest, GenerationRequest
from llama_worker._version import __version__

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger("llama_worker")

OperationName: TypeAlias = Literal["chat", "text_completion", "embeddings"]
Value: TypeAlias = str | int | float | Sequence[str]

PROVIDER = "llama_worker"
PATIENCE = 1.0  # seconds at exit, for what is not reported yet

_DURATIONS = tuple(0.01 * 2**i for i in range(14))
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(4**i for i in range(14))


@dataclass(frozen=True, slots=True)
class Instruments:
    """What the application's providers gave us."""

    tracer: Tracer
    duration: Histogram
    tokens: Histogram
    first_token: Histogram
    per_token: Histogram


@cache
def instruments() -> Instruments | None:
    """None when opentelemetry-api is not installed. Imported by the first request, never with the package."""
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        return None
    meter = metrics.get_meter("llama_worker", __version__)

    def times(name: str, bounds: Sequence[float], what: str) -> Histogram:
        return meter.create_histogram(name, "s", what, explicit_bucket_boundaries_advisory=bounds)

    return Instruments(
        tracer=trace.get_tracer("llama_worker", __version__),
        duration=times("gen_ai.client.operation.duration", _DURATIONS, "From submitting a request to its answer."),
        first_token=times("gen_ai.server.time_to_first_token", _FIRST_TOKEN, "Until the first token was computed."),
        per_token=times("gen_ai.server.time_per_output_token", _PER_TOKEN, "From one token to the next, on average."),
        tokens=meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of prompts and of replies.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        ),
    )


class Operation:
    """One request under observation, from its submission to its end."""

    def __init__(self, to: Instruments, name: OperationName, model: str, attributes: Mapping[str, Value]) -> None:
        self._to = to
        self._common: dict[str, Value] = {
            "gen_ai.operation.name": name,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
        }
        self._started = time.monotonic()
        self._span = _start_span(to.tracer, f"{name} {model}", {**self._common, **attributes})
        self._over = False

    def answered(self, answer: Answer, record: Record) -> None:
        """A Listener of its Record. Any thread; never blocks."""
        first = None if record.first_token is None else record.first_token - self._started
        ended, moment, per_token = time.monotonic(), time.time_ns(), record.inter_token
        _reporter.add(lambda: self._end(answer, ended - self._started, moment, first, per_token))

    def refused(self, error: BaseException) -> None:
        """It was not accepted."""
        self.answered(Answer(usage=Usage(), error=error), Record())

    def _end(self, answer: Answer, seconds: float, moment: int, first: float | None, per_token: float | None) -> None:
        if self._over:  # the caller gave up while the worker answered
            return
        self._over = True
        common = dict(self._common)
        if answer.error is not None:
            common["error.type"] = type(answer.error).__name__
        self._record_times(common, seconds, first, per_token)
        self._record_usage(answer)
        self._end_span(answer, moment)

    def _record_times(
        self, common: Mapping[str, Value], seconds: float, first: float | None, per_token: float | None
    ) -> None:
        self._to.duration.record(seconds, common)
        if first is not None and "error.type" not in common:
            self._to.first_token.record(first, common)
        if per_token is not None and "error.type" not in common:
            self._to.per_token.record(per_token, common)

    def _record_usage(self, answer: Answer) -> None:
        if not answer.usage.prompt_tokens:  # nothing was computed
            return
        self._to.tokens.record(answer.usage.prompt_tokens, {**self._common, "gen_ai.token.type": "input"})
        if answer.texts is None:
            self._to.tokens.record(answer.usage.completion_tokens, {**self._common, "gen_ai.token.type": "output"})

    def _end_span(self, answer: Answer, moment: int) -> None:
        from opentelemetry.trace import StatusCode

        span, usage = self._span, answer.usage
        if usage.prompt_tokens:
            span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        if usage.prompt_tokens and answer.texts is None:
            span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
        if answer.reason is not None:
            span.set_attribute("gen_ai.response.finish_reasons", (answer.reason,))
        if answer.error is not None:
            span.set_attribute("error.type", type(answer.error).__name__)
            span.set_status(StatusCode.ERROR)  # without the message: it is the application's to show
        span.end(moment)


def _start_span(tracer: Tracer, name: str, attributes: Mapping[str, Value]) -> Span:
    from opentelemetry.trace import SpanKind

    return tracer.start_span(name, kind=SpanKind.INTERNAL, attributes=attributes)


def _begin(request: GenerationRequest | EmbedRequest, model: str) -> Operation | None:
    to = instruments()
    if to is None:
        return None
    _reporter.start()
    if isinstance(request, EmbedRequest):
        return Operation(to, "embeddings", model, {})
    name: OperationName = "text_completion" if request.messages is None else "chat"
    return Operation(to, name, model, _sampling(request))


def _sampling(request: GenerationRequest) -> dict[str, Value]:
    params = request.params
    known = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "seed": params.seed,
    }
    return {f"gen_ai.request.{name}": value for name, value in known.items() if value is not None}


@contextmanager
def observed(request: GenerationRequest | EmbedRequest, model: str, *listeners: Listener) -> Iterator[Record]:
    """The record of a request to `model`, which is submitted in the `with` block by the calling thread."""
    operation = _begin(request, model)
    if operation is None:
        yield Record(*listeners)
        return
    try:
        yield Record(*listeners, operation.answered)
    except BaseException as error:
        operation.refused(error)
        raise


# -- the thread that reports


def _report(report: Callable[[], object]) -> None:
    try:
        report()
    except Exception:  # an exporter's fault is nobody's who asked for a reply
        logger.exception("a request could not be reported to OpenTelemetry")


_reporter: Background[Callable[[], object]] = Background("llama-worker-telemetry", _report)


def flush(seconds: float = PATIENCE) -> bool:
    """Wait until what has ended so far is reported to the application's providers. False when there was no time."""
    if not _reporter.started:
        return True
    done = threading.Event()
    _reporter.add(done.set)
    return done.wait(seconds)


_exit.after_leaving(flush)  # who is interrupted by leaving has a span too
