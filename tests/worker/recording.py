"""A sink between a worker and its readers that keeps account of every terminal event."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from typing import Any

from llama_worker import Failed, Finished, LlamaWorker, StreamEvent
from llama_worker._commands import EventSink, Generate, Request
from llama_worker._metrics import Metrics


class Ledger:
    """The sums over all terminal events that went through its sinks: endings by name, and tokens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sums: Counter[str] = Counter()

    def note(self, event: Finished | Failed) -> None:
        ending = event.reason if isinstance(event, Finished) else type(event.error).__name__
        with self._lock:
            self.sums[ending] += 1
            self.sums["prompt"] += event.usage.prompt_tokens
            self.sums["completion"] += event.usage.completion_tokens
            self.sums["cached"] += event.usage.cached_tokens

    def listen(self, worker: LlamaWorker) -> None:
        """Have every generation that `worker` accepts from now on answered through a sink of this ledger."""
        admission: Any = worker._admission
        put, aput = admission.put, admission.aput
        admission.put = lambda request: put(self._recorded(request))
        admission.aput = lambda request: aput(self._recorded(request))

    def _recorded(self, request: Request) -> Request:
        return replace(request, sink=LedgerSink(request.sink, self)) if isinstance(request, Generate) else request


class LedgerSink:
    """Passes events on and shows the terminal ones to the ledger."""

    def __init__(self, sink: EventSink, ledger: Ledger) -> None:
        self._sink = sink
        self._ledger = ledger

    def put(self, event: StreamEvent) -> None:
        if isinstance(event, Finished | Failed):
            self._ledger.note(event)
        self._sink.put(event)

    def taken_while_waiting(self) -> int | None:
        return self._sink.taken_while_waiting()


def sums_of(metrics: Metrics) -> Counter[str]:
    """What a worker counted, as a ledger keeps it."""
    tokens = {
        "prompt": metrics.prompt_tokens,
        "completion": metrics.completion_tokens,
        "cached": metrics.cached_tokens,
    }
    return Counter({**metrics.finished, **metrics.failed, **tokens})
