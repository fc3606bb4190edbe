"""The registry: one live worker for each configuration, shared by the whole process.

Adapters are constructed freely (LangChain builds ten in one test and one more at each
`configurable_fields` call), so constructing one must never load weights. They ask here at first use, and
all that ask for the same thing get the same worker. A worker stays until it is closed; one that was
closed, died or could not load is replaced at the next call, and so is one inherited through fork().
"""

from __future__ import annotations

import os
import threading

from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._worker import LlamaWorker

_Key = tuple[ModelConfig, WorkerConfig, int]

_workers: dict[_Key, LlamaWorker] = {}
_lock = threading.Lock()


def get_worker(config: ModelConfig | str, worker_config: WorkerConfig | None = None) -> LlamaWorker:
    """The live worker for this configuration; begins to load it if there is none. Any thread.

    Returns at once: the first call that needs the model waits for it, or raises ModelLoadError. The
    process is part of the key, because a worker thread does not survive fork().
    """
    wanted = ModelConfig(model=config) if isinstance(config, str) else config
    behaviour = worker_config or WorkerConfig()
    key = (_canonical(wanted), behaviour, os.getpid())
    with _lock:
        worker = _workers.get(key)
        if worker is None or worker.is_closed:
            worker = _workers[key] = LlamaWorker.begin(wanted, behaviour)
        return worker


def close_all() -> None:
    """Close every worker of the registry. Blocks until their models are freed."""
    with _lock:
        workers = [worker for (_, _, pid), worker in _workers.items() if pid == os.getpid()]
        _workers.clear()
    for worker in workers:
        worker.close()


def _after_fork() -> None:
    # The child inherits the table, whose threads it does not have, and perhaps a lock held by nobody.
    global _lock
    _lock = threading.Lock()
    _workers.clear()


def _canonical(config: ModelConfig) -> ModelConfig:
    """Two spellings of one path are one model."""
    if "://" in config.model:
        return config
    # No look at the file system: this is called on event loops, at every request of an adapter.
    path = os.path.abspath(os.path.expanduser(config.model))
    return config.model_copy(update={"model": path})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
