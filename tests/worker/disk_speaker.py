"""A process that opens a real model with a folder, answers prompts, and writes down the logits of each first token."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llama_worker._snapshots import cache_metrics_of
from tests.worker.test_checkpoints import Run


def speak(model: Path, prompts: list[str], *, most: int = 1, **config: Any) -> tuple[np.ndarray, list[int], Any]:
    """The first logits of each answer, how many tokens each was spared, and the cache's metrics; then the end."""
    run = Run(model, n_parallel=1, cache_ram=0, **config)
    rows, cached = [], []
    for prompt in prompts:
        cached.append(run.answer(prompt, n=most).terminal.usage.cached_tokens)
        rows.append(run.logits())
    metrics = cache_metrics_of(run.bench.service)
    run.bench.shut_down()
    return np.stack(rows), cached, metrics


def main(model: str, out: str, prompts: str, config: str) -> None:
    rows, cached, metrics = speak(Path(model), json.loads(prompts), **json.loads(config))
    np.savez(out, rows=rows, cached=cached, hits=metrics.disk_hits, failures=metrics.disk_failures)


if __name__ == "__main__":
    main(*sys.argv[1:])
