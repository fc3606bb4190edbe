"""Diagnostics: what a bug report should say of a worker. No paths beyond names, no text of anybody's."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

import psutil

from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._engine.base import EngineLimits
from llama_worker._health import health_of, without_paths
from llama_worker._service import Service
from llama_worker._snapshots import cache_metrics_of, lora_metrics_of, metrics_of
from llama_worker._version import __version__

_PACKAGES = (
    "llama-cpp-python",
    "numpy",
    "pydantic",
    "jinja2",
    "langchain-core",
    "llama-index-core",
    "opentelemetry-api",
)


def diagnose(service: Service, config: ModelConfig, worker_config: WorkerConfig) -> dict[str, Any]:
    """A dict that json.dumps takes. Never waits."""
    loaded = service.loaded
    return {
        "llama_worker": __version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": {"version": platform.python_version(), "implementation": sys.implementation.name},
        "system": _system(),
        "model_config": _model(config.model_dump(mode="json")),
        "worker_config": worker_config.model_dump(mode="json"),
        "model": None if loaded is None else _model(asdict(loaded.view.info)),
        "limits": None if loaded is None else _limits(loaded.view.limits),
        "health": asdict(without_paths(health_of(service))),
        "epoch": service.epoch,
        "metrics": asdict(metrics_of(service)),
        "cache": asdict(cache_metrics_of(service)),
        "loras": {name: asdict(counts) for name, counts in lora_metrics_of(service).items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cores": psutil.cpu_count(logical=False),
        "memory": memory.total,
        "memory_available": memory.available,
        "process_memory": psutil.Process().memory_info().rss,
    }


def _limits(limits: EngineLimits) -> dict[str, Any]:
    return {**asdict(limits), "state_mark": limits.state_mark.hex()}


_PATHS = ("model", "path", "cache_dir", "draft_model")


def _model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names for paths, which say where somebody works and often who they are; a length for the template."""
    named = {key: _named(value) if key in _PATHS and value else value for key, value in values.items()}
    template = values["chat_template"]
    if "lora_paths" in values:
        named["lora_paths"] = [(name, PurePath(path).name) for name, path in values["lora_paths"]]
    return {**named, "chat_template": None if template is None else f"<{len(template)} characters>"}


def _named(model: str) -> str:
    return model if "://" in model else PurePath(model).name
