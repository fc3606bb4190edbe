"""WorkerHandle: a share in the one worker of a configuration, which is opened by its first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._worker import LlamaWorker


class WorkerHandle:
    """Keeps a configuration's worker open for as long as somebody holds the handle. Any thread.

    Get it from `get_handle`, which gives the same one to all that ask for the same configuration. Having
    it loads nothing. Copies are the handle itself; a pickle carries the configuration, and is the handle
    of the process that reads it. Usable on any number of event loops, and in a forked child, which opens
    a worker of its own.
    """

    __slots__ = ("__weakref__", "_config", "_find", "_worker", "_worker_config")

    def __init__(
        self,
        config: ModelConfig,
        worker_config: WorkerConfig,
        find: Callable[[ModelConfig, WorkerConfig], LlamaWorker],
    ) -> None:
        self._config = config
        self._worker_config = worker_config
        self._find = find
        self._worker: LlamaWorker | None = None

    def __repr__(self) -> str:
        return f"<WorkerHandle {self._config.model!r} {'unopened' if self._worker is None else self._worker!r}>"

    def __copy__(self) -> WorkerHandle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WorkerHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        from llama_worker._registry import get_handle

        return get_handle, (self._config, self._worker_config)

    def worker(self) -> LlamaWorker:
        """The live worker, as `get_worker` gives it and raising as that does. Never blocks."""
        worker = self._worker
        if worker is None or worker.is_closed:
            worker = self._worker = self._find(self._config, self._worker_config)
        return worker

    @property
    def opened(self) -> LlamaWorker | None:
        """The worker that was last used, perhaps closed by now; None before the first use. Opens nothing."""
        return self._worker
