"""Changing how a running worker treats its callers, without touching its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_worker._admission import Admission
from llama_worker._config import WorkerConfig
from llama_worker._errors import ConfigError
from llama_worker._service import Service

LIVE = ("queue_size", "on_full", "step_budget_ms", "keep_alive")
"""The fields of WorkerConfig that can change while a worker runs."""


def changed(config: WorkerConfig, changes: Mapping[str, Any]) -> WorkerConfig:
    """`config` with `changes`. Raises ConfigError for a value that cannot work, or a field that cannot change now."""
    for field in changes:
        if field in WorkerConfig.model_fields and field not in LIVE:
            raise ConfigError(field, changes[field], f"it cannot change while a worker runs; {', '.join(LIVE)} can")
    return WorkerConfig(**{**config.model_dump(), **changes})


def apply(config: WorkerConfig, service: Service, admission: Admission) -> None:
    """Have the worker go by `config` from its next step on. Any thread; never waits."""
    service.step_budget_ms = config.step_budget_ms
    service.keep_alive = config.keep_alive
    loaded = service.loaded
    if loaded is not None:
        loaded.scheduler.pace.budget_ms = config.step_budget_ms
    admission.on_full = config.on_full
    service.channel.resize(config.queue_size)
    service.channel.nudge()  # an idle worker looks at its clock again
