"""A process that opens a real model with a folder, or with an export, answers prompts, and writes down the logits of
each first token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llama_worker._cache_transfer import CacheTransfer
from llama_worker._snapshots import cache_metrics_of
from tests.worker.probe import Mistake
from tests.worker.story import finished
from tests.worker.test_checkpoints import Run


def speak(
    model: Path,
    prompts: list[str],
    *,
    most: int = 1,
    exported: str | None = None,
    imported: str | None = None,
    mistake: Mistake | None = None,
    **config: Any,
) -> tuple[np.ndarray, list[int], Any]:
    """The first logits of each answer, how many tokens each was spared, and the cache's metrics; then the end.

    It begins with what is `imported` from a folder, and what it has in the end is `exported` to one.
    """
    run = Run(model, mistake, **{"n_parallel": 1, "cache_ram": 0, **config})
    if imported is not None:
        assert finished(run.bench, CacheTransfer.import_cache, Path(imported))
    rows, cached = [], []
    for prompt in prompts:
        cached.append(run.answer(prompt, n=most).terminal.usage.cached_tokens)
        rows.append(run.logits())
    metrics = cache_metrics_of(run.bench.service)
    if exported is not None:
        assert finished(run.bench, CacheTransfer.export_cache, Path(exported))
    run.bench.shut_down()
    return np.stack(rows), cached, metrics


def main(model: str, out: str, prompts: str, config: str) -> None:
    rows, cached, metrics = speak(Path(model), json.loads(prompts), **json.loads(config))
    np.savez(out, rows=rows, cached=cached, hits=metrics.disk_hits, failures=metrics.disk_failures)


if __name__ == "__main__":
    main(*sys.argv[1:])
