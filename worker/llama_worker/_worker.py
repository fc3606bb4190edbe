"""LlamaWorker: a model on a thread of its own, from its first breath to its last.

What can be asked of it stands by what it needs: `_worker_requests` hands in requests, `_worker_reports` looks,
and `_worker_changes` has the model served otherwise.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any
from uuid import uuid4

from llama_worker import _exit, _watchdog
from llama_worker._admission import Admission
from llama_worker._cache_transfer import CacheTransfer
from llama_worker._channel import CommandChannel
from llama_worker._config import ModelConfig, WorkerConfig, as_model_config, as_worker_config
from llama_worker._desk import Desk
from llama_worker._engine.base import Loader, LoraInfo, ModelInfo
from llama_worker._llama_loading import contained, load_llama
from llama_worker._loader_thread import LoaderThread
from llama_worker._loop import run
from llama_worker._parking import guarded
from llama_worker._preparer import Preparer
from llama_worker._published import Published
from llama_worker._record import Listener, Record
from llama_worker._requests import EmbedRequest, GenerationRequest
from llama_worker._service import Service
from llama_worker._snapshots import name_of
from llama_worker._stall import StallWatch
from llama_worker._state import WorkerState
from llama_worker._telemetry import observed
from llama_worker._view import ModelView
from llama_worker._worker_changes import WorkerChanges
from llama_worker._worker_reports import WorkerReports
from llama_worker._worker_requests import WorkerRequests

living: weakref.WeakValueDictionary[str, LlamaWorker] = weakref.WeakValueDictionary()
"""Every worker of this process, by its token."""


class LlamaWorker(WorkerRequests, WorkerReports, WorkerChanges):
    """One llama.cpp model, owned by one thread, for the whole process.

    Every method may be called from any thread, and the a-twins from any event loop; nothing but the
    worker thread touches the model. `LlamaWorker(config)` blocks until the model is loaded and raises
    ModelLoadError. `loader` replaces llama.cpp (tests use it).

    A prompt is a str (raw completion), a sequence of messages (chat, rendered by the model's template)
    or a GenerationRequest. Sampling keywords are the fields of SamplingParams.
    """

    def __init__(
        self,
        config: ModelConfig | str,
        worker_config: WorkerConfig | None = None,
        *,
        loader: Loader | None = None,
    ) -> None:
        self._start(as_model_config(config), as_worker_config(worker_config), loader or load_llama)
        try:
            self._view()
        except BaseException:
            self.close()
            raise

    @classmethod
    def begin(
        cls,
        config: ModelConfig | str,
        worker_config: WorkerConfig | None = None,
        *,
        loader: Loader | None = None,
    ) -> LlamaWorker:
        """A worker that loads in the background: the first call that needs the model waits, or raises."""
        worker = cls.__new__(cls)
        worker._start(as_model_config(config), as_worker_config(worker_config), loader or load_llama)
        return worker

    def _start(self, config: ModelConfig, worker_config: WorkerConfig, loader: Loader) -> None:
        self._created_with = config
        self._worker_config = self._live_config = worker_config
        self._published = Published()
        self._channel = CommandChannel(worker_config.queue_size)
        self._admission = Admission(self._channel, worker_config.on_full, self._published.why_closed)
        self._preparer = Preparer(self._published.why_closed)
        self._token = uuid4().hex
        living[self._token] = self
        self._loads_llama = loader is load_llama
        contain = worker_config.contain_crashes
        self._service = Service(
            channel=self._channel,
            loader=contained(loader) if contain else loader,
            config=config,
            step_budget_ms=worker_config.step_budget_ms,
            keep_alive=worker_config.keep_alive,
            stalls=None if worker_config.stall_timeout is None else StallWatch(worker_config.stall_timeout),
            preparer=self._preparer,
            publish=self._published.show,
            launch=LoaderThread(contain=contain),
        )
        # The desk holds what it needs, not the worker: a worker without users ends by reference count alone.
        observe = partial(_observed, self._service, self._published)
        self._desk = Desk(self._published, self._admission, self._preparer, observe)
        self._transfer = CacheTransfer(self._channel, self._published.why_closed)
        body = guarded(run) if contain else run
        self._thread = threading.Thread(target=body, args=(self._service,), name="llama-worker", daemon=True)
        _exit.watch(self._service, self._thread)
        # A worker that is dropped without close() ends too: its thread holds the service, not the worker.
        self._finalizer = weakref.finalize(self, _exit.let_go, self._service, os.getpid())
        self._finalizer.atexit = False
        self._thread.start()
        if contain or worker_config.step_timeout is not None:
            _watchdog.watch(self._service, self._thread, worker_config.step_timeout)

    def __repr__(self) -> str:
        return f"<LlamaWorker {self._created_with.model!r} {self._service.state} {self._channel!r}>"

    def __enter__(self) -> LlamaWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __copy__(self) -> LlamaWorker:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LlamaWorker:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        from llama_worker._registry import find_worker

        return find_worker, (self._token, self._created_with, self._worker_config)

    # -- what is loaded -----------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """The model that is served now. Waits for loading; raises ModelLoadError or WorkerClosed."""
        return self._view().info

    @property
    def n_ctx(self) -> int:
        """Tokens that one request may use, prompt and completion. Waits for loading."""
        return self._view().n_ctx

    @property
    def loras(self) -> Mapping[str, LoraInfo]:
        """The LoRA adapters that requests may name now. Waits for loading."""
        return self._view().loras

    @property
    def is_closed(self) -> bool:
        """Whether it was closed or died, or is a forked parent's: it will never serve again, here."""
        return self._desk.is_inherited or self._service.is_over

    @classmethod
    def import_state(cls, state: Mapping[str, Any], *, loader: Loader | None = None) -> LlamaWorker:
        """Another worker like the one that exported `state`: same model, same configuration, nobody waiting yet.

        Blocks until it is loaded, as `LlamaWorker(config)` does. Raises ConfigError, naming the field, and
        ModelLoadError.
        """
        parsed = WorkerState.from_json(state)
        return cls(parsed.model, parsed.worker, loader=loader)

    # -- its end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Answer everyone with WorkerClosed, free the model and end the thread. Blocks; idempotent.

        In a forked child it does nothing: the worker is the parent's.
        """
        self._shut_down()
        if self._desk.is_inherited or threading.current_thread() is self._thread:
            return
        self._service.ended.result()
        if not self._service.parked:
            self._thread.join()

    async def aclose(self) -> None:
        """The async twin of `close`."""
        self._shut_down()
        if not self._desk.is_inherited:
            await asyncio.shield(asyncio.wrap_future(self._service.ended))

    # -- inside -------------------------------------------------------------------------------------

    def _view(self) -> ModelView:
        return self._desk.view()

    def _shut_down(self) -> None:
        if not self._desk.is_inherited:
            _exit.interrupt(self._service)


def _observed(
    service: Service, published: Published, request: GenerationRequest | EmbedRequest
) -> AbstractContextManager[Record]:
    listeners: list[Listener] = [service.meter.answered]
    if isinstance(request, GenerationRequest) and request.loras:
        listeners.append(lambda answer, _: service.loras.answered(request, answer))
    return observed(request, name_of(service, published.current), *listeners)
