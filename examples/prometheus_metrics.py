"""A worker's counters and times for Prometheus: `start_http_server(port, registry=registry)` would serve them."""

import sys
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llama_worker import Distribution, LlamaWorker

COUNTERS = ("prompt_tokens", "completion_tokens", "cached_tokens", "aborts", "preemptions", "reloads")
TIMES = ("queue_wait", "time_to_first_token", "inter_token", "step_time")


class WorkerCollector(Collector):
    """Asks the worker at each scrape, which takes microseconds."""

    def __init__(self, worker: LlamaWorker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        metrics, cache = self._worker.metrics(), self._worker.cache_metrics()
        for name in COUNTERS:
            yield CounterMetricFamily(f"llama_worker_{name}", f"See Metrics.{name}.", value=getattr(metrics, name))
        ended = CounterMetricFamily("llama_worker_requests", "Requests that ended, and how.", labels=["outcome"])
        for outcome, count in (*metrics.finished.items(), *metrics.failed.items()):
            ended.add_metric([outcome], count)
        yield ended
        for name in TIMES:
            yield histogram(f"llama_worker_{name}_seconds", getattr(metrics, name))
        yield GaugeMetricFamily("llama_worker_queued", "Requests in the channel.", value=metrics.queued)
        yield GaugeMetricFamily("llama_worker_cells_used", "KV cells in use.", value=cache.used)


def histogram(name: str, times: Distribution) -> HistogramMetricFamily:
    bounds = [*map(str, times.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(times.counts), strict=True))
    return HistogramMetricFamily(name, "A time in seconds.", buckets=buckets, sum_value=times.sum)


if __name__ == "__main__":
    with LlamaWorker("demo://smollm2-135m-instruct") as worker:
        registry = CollectorRegistry()
        registry.register(WorkerCollector(worker))
        worker.generate("The tide", max_tokens=int(sys.argv[1]) if sys.argv[1:] else 32, temperature=0.0)
        print(generate_latest(registry).decode())
