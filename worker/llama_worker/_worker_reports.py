"""WorkerReports: how a worker is and what it counted, for whoever watches it. Nothing here waits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._desk import Desk
from llama_worker._diagnostics import diagnose
from llama_worker._exporter import Exporter, state_of
from llama_worker._health import Health, health_of
from llama_worker._lora_metrics import LoraMetrics
from llama_worker._metrics import CacheMetrics, Metrics
from llama_worker._published import Published
from llama_worker._service import Service
from llama_worker._snapshots import cache_metrics_of, lora_metrics_of, metrics_of, name_of
from llama_worker._state import WorkerState, waiting_requests
from llama_worker._status import Status, status_of


class WorkerReports:
    """The part of LlamaWorker that looks and changes nothing."""

    _created_with: ModelConfig
    _live_config: WorkerConfig
    _service: Service
    _published: Published
    _desk: Desk

    @property
    def config(self) -> ModelConfig:
        """The configuration that is served now. Does not wait; while loading it is the one given."""
        view = self._published.current
        return self._created_with if view is None else view.config

    def status(self) -> Status:
        """A snapshot; "closed" in a forked child. Never waits."""
        return status_of(self._service, self.config.model, inherited=self._desk.is_inherited)

    def health(self) -> Health:
        """Whether it serves, and if not as it should, why. Never waits."""
        return health_of(self._service, inherited=self._desk.is_inherited)

    def metrics(self) -> Metrics:
        """Everything counted since the worker started. Never waits."""
        return metrics_of(self._service)

    def cache_metrics(self) -> CacheMetrics:
        """How full the KV cache of the loaded model is, and how well it is reused. Never waits."""
        return cache_metrics_of(self._service)

    def lora_metrics(self) -> dict[str, LoraMetrics]:
        """What each LoRA adapter was used for since the worker started, by name. Never waits."""
        return lora_metrics_of(self._service)

    def diagnostics(self) -> dict[str, Any]:
        """What a bug report should say, as a dict that json.dumps takes: no paths, no prompts. Never waits."""
        return diagnose(self._service, self.config, self._live_config)

    def export_state(self) -> dict[str, Any]:
        """What this worker is and who waits for it, as JSON. Never waits.

        The configurations, the status, the metrics and, of each request that waits, its age, session, priority
        and length, never text.
        """
        return WorkerState.of(
            model=self.config,
            worker=self._live_config,
            status=self.status(),
            metrics=self.metrics(),
            waiting=waiting_requests(self._service),
            now=time.monotonic(),
        ).to_json()

    def export(self, path: str | Path | None = None) -> Path:
        """Let other processes of this user watch the worker (`python -m llama_worker top`) until it ends.

        Returns the Unix socket, `path` or one in the user's runtime folder. What goes out carries no texts.
        Raises ConfigError when no socket can be made there, UnsupportedFeatureError where there are none, WorkerClosed.
        """
        self._desk.check_process()
        self._service.check_open(self._published.why_closed)
        service, name = self._service, name_of(self._service, self._published.current)
        exporter = Exporter(lambda: state_of(service, name), path)
        service.ended.add_done_callback(lambda _: exporter.close())
        return exporter.path
