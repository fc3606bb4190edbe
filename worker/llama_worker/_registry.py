"""The registry: one live worker for each configuration, shared by the whole process.

Adapters are constructed freely (LangChain builds ten in one test and one more at each
`configurable_fields` call), so constructing one must never load weights. Each holds a WorkerHandle, and
asks it at each request; all that ask for the same thing get the same worker.

Whoever uses a worker holds it, and the registry does not: when the last user lets go (a caller of
get_worker, a handle, a stream) the worker ends in the background and its model is freed. One that was
closed or could not load is replaced at the next call, and so is one inherited through fork(). One that
died is replaced too, but not for ever: see Restarts.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future

from llama_worker import _exit
from llama_worker._config import ModelConfig, WorkerConfig, as_model_config, as_worker_config
from llama_worker._errors import ModelLoadError, WorkerDied
from llama_worker._handle import WorkerHandle
from llama_worker._published import Published
from llama_worker._restarts import LIMIT, WITHIN, Restarts
from llama_worker._worker import LlamaWorker, living

_Key = tuple[ModelConfig, WorkerConfig]


class Place:
    """Where the worker of one configuration lives, and how often it was started anew."""

    def __init__(self, restarts: Restarts) -> None:
        self.restarts = restarts
        self._worker: weakref.ref[LlamaWorker] | None = None
        self._published: Published | None = None
        self._freed: Future[None] | None = None

    @property
    def worker(self) -> LlamaWorker | None:
        """The worker, if it lives."""
        worker = None if self._worker is None else self._worker()
        return None if worker is None or worker.is_closed else worker

    @property
    def death(self) -> WorkerDied | ModelLoadError | None:
        """What the last worker died of; None if it was closed, let go, or could not load for a plain reason."""
        failure = None if self._published is None else self._published.failure
        if isinstance(failure, ModelLoadError):
            return failure if failure.crashed else None
        return failure if isinstance(failure, WorkerDied) else None

    @property
    def is_forgettable(self) -> bool:
        return self.worker is None and self.death is None and not len(self.restarts)

    def clear(self) -> None:
        """Another worker comes; it may not load before the memory of the last one is free."""
        if self._freed is not None:
            _exit.leaves(self._freed)

    def take(self, worker: LlamaWorker) -> None:
        self._worker = weakref.ref(worker)
        # The reason must outlive the worker: who hears that it died may let go of it.
        self._published = worker._published
        self._freed = worker._service.freed


class Registry:
    """The workers and handles of one process, by configuration. `begin` starts a worker; any thread."""

    def __init__(
        self,
        begin: Callable[[ModelConfig, WorkerConfig], LlamaWorker] = LlamaWorker.begin,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._begin = begin
        self._clock = clock
        self._lock = threading.Lock()
        self._places: dict[_Key, Place] = {}
        self._handles: weakref.WeakValueDictionary[_Key, WorkerHandle] = weakref.WeakValueDictionary()

    def worker(self, config: ModelConfig, worker_config: WorkerConfig) -> LlamaWorker:
        """See get_worker."""
        key = _key(config, worker_config)
        with self._lock:
            place = self._places.get(key)
            worker = None if place is None else place.worker
            return self._start(key) if worker is None else worker

    def handle(self, config: ModelConfig, worker_config: WorkerConfig) -> WorkerHandle:
        """See get_handle."""
        key = _key(config, worker_config)
        with self._lock:
            handle = self._handles.get(key)
            if handle is None:
                handle = self._handles[key] = WorkerHandle(*key, self.worker)
            return handle

    def close_all(self) -> None:
        """Close every worker and forget every death. Blocks until the models are freed."""
        with self._lock:
            workers = [place.worker for place in self._places.values()]
            self._places.clear()
        for worker in workers:
            if worker is not None:
                worker.close()

    def forget(self) -> None:
        """This process is a forked child: the threads are the parent's, and the lock perhaps nobody's."""
        self._lock = threading.Lock()
        self._places = {}

    def __len__(self) -> int:
        """How many configurations are remembered."""
        return len(self._places)

    def _start(self, key: _Key) -> LlamaWorker:
        self._places = {k: place for k, place in self._places.items() if k == key or not place.is_forgettable}
        place = self._places.setdefault(key, Place(Restarts(self._clock)))
        if place.death is not None:
            _check_restart(place, place.death, key[0].model)
            place.restarts.note()
        place.clear()
        worker = self._begin(*key)
        place.take(worker)
        return worker


_registry = Registry()


def get_worker(config: ModelConfig | str, worker_config: WorkerConfig | None = None) -> LlamaWorker:
    """The live worker for this configuration; begins to load it if there is none. Any thread.

    Returns at once: the first call that needs the model waits for it, or raises ModelLoadError. The worker
    lives until it is closed, or until nobody holds it any more: keep what you get for as long as the model
    should stay loaded. Equal means the same absolute path and equal fields; a reload does not change which
    configuration a worker is found by.

    One that died is started anew by the next call, the first time at once and then less and less often;
    meanwhile it raises WorkerDied with `retry_after`.
    """
    return _registry.worker(as_model_config(config), as_worker_config(worker_config))


def get_handle(config: ModelConfig | str, worker_config: WorkerConfig | None = None) -> WorkerHandle:
    """A share in the worker for this configuration, which is opened by its first use. Any thread.

    Everybody who asks for the same configuration gets the same handle, while somebody holds it.
    """
    return _registry.handle(as_model_config(config), as_worker_config(worker_config))


def find_worker(token: str, config: ModelConfig, worker_config: WorkerConfig) -> LlamaWorker:
    """What a pickled worker becomes: the very one, if it lives in this process, else the registry's."""
    worker = living.get(token)
    return get_worker(config, worker_config) if worker is None or worker.is_closed else worker


def close_all() -> None:
    """Close every worker that get_worker has given, whoever holds it. Blocks until the models are freed.

    The deaths of workers are forgotten too: whatever was refused may be started again.
    """
    _registry.close_all()


def _check_restart(place: Place, death: WorkerDied | ModelLoadError, model: str) -> None:
    delay = place.restarts.delay()
    if delay <= 0:
        return
    raise WorkerDied(
        f"{model}: {death}. {len(place.restarts)} of {LIMIT} restarts within {WITHIN:g} s are used up, the next is "
        f"possible in {delay:.1f} s. Mend what kills it, or call close_all() to start over",
        retry_after=delay,
    ) from (death.__cause__ or death)


def _key(config: ModelConfig, worker_config: WorkerConfig) -> _Key:
    """Two spellings of one path are one model."""
    given = {"model": config.model, "draft_model": config.draft_model}
    # No look at the file system: this is called on event loops, at every request of an adapter.
    paths = {
        name: os.path.abspath(os.path.expanduser(path)) for name, path in given.items() if path and "://" not in path
    }
    return config.model_copy(update=paths) if paths else config, worker_config


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_registry.forget)
