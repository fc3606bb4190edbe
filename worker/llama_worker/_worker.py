"""LlamaWorker: a model on a thread of its own, and every way to ask something of it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Literal
from uuid import uuid4

from llama_worker import _exit, _watchdog
from llama_worker._admission import Admission
from llama_worker._batch import Batch
from llama_worker._cache_transfer import CacheTransfer
from llama_worker._channel import CommandChannel
from llama_worker._commands import ChangeLora, Reload
from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._desk import Desk
from llama_worker._diagnostics import diagnose
from llama_worker._engine.base import Loader, LoraInfo, ModelInfo
from llama_worker._errors import InvalidRequestError
from llama_worker._events import Reply
from llama_worker._exporter import Exporter, state_of
from llama_worker._health import Health, health_of
from llama_worker._llama_loading import check_loras, check_reload, contained, load_llama
from llama_worker._loader_thread import LoaderThread
from llama_worker._loop import run
from llama_worker._lora_changes import with_paths
from llama_worker._lora_metrics import LoraMetrics
from llama_worker._metrics import CacheMetrics, Metrics
from llama_worker._parking import guarded
from llama_worker._preparer import Preparer
from llama_worker._prompts import (
    MessageLike,
    Prompt,
    ToolLike,
    core_messages,
    core_tools,
    embed_request,
    generation_request,
)
from llama_worker._published import Published
from llama_worker._reconfiguring import apply as apply_live
from llama_worker._reconfiguring import changed as reconfigured
from llama_worker._record import Listener, Record
from llama_worker._requests import EmbedRequest, GenerationRequest
from llama_worker._service import Service
from llama_worker._session import Session
from llama_worker._session_report import PrefixStatus
from llama_worker._snapshots import cache_metrics_of, lora_metrics_of, metrics_of
from llama_worker._stall import StallWatch
from llama_worker._state import WorkerState, waiting_requests
from llama_worker._status import Status, status_of
from llama_worker._streams import AsyncEventStream, EventStream, LastWord, Mailbox
from llama_worker._telemetry import observed
from llama_worker._view import ModelView

living: weakref.WeakValueDictionary[str, LlamaWorker] = weakref.WeakValueDictionary()
"""Every worker of this process, by its token."""
_WARM_UP = "Hello"


class LlamaWorker:
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
        self._start(_model_config(config), worker_config or WorkerConfig(), loader or load_llama)
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
        worker._start(_model_config(config), worker_config or WorkerConfig(), loader or load_llama)
        return worker

    def _start(self, config: ModelConfig, worker_config: WorkerConfig, loader: Loader) -> None:
        self._created_with = config
        self._worker_config = self._live_config = worker_config
        self._published = Published()
        self._channel = CommandChannel(worker_config.queue_size)
        self._admission = Admission(self._channel, worker_config.on_full, self._published.why_closed)
        self._preparer = Preparer()
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
    def config(self) -> ModelConfig:
        """The configuration that is served now. Does not wait; while loading it is the one given."""
        view = self._published.current
        return self._created_with if view is None else view.config

    @property
    def n_ctx(self) -> int:
        """Tokens that one request may use, prompt and completion. Waits for loading."""
        return self._view().n_ctx

    @property
    def is_closed(self) -> bool:
        """Whether it was closed or died, or is a forked parent's: it will never serve again, here."""
        return self._desk.is_inherited or self._service.state in ("closed", "dead")

    def status(self) -> Status:
        """A snapshot. Never waits."""
        return status_of(self._service, self.config.model)

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

    @classmethod
    def import_state(cls, state: Mapping[str, Any], *, loader: Loader | None = None) -> LlamaWorker:
        """Another worker like the one that exported `state`: same model, same configuration, nobody waiting yet.

        Blocks until it is loaded, as `LlamaWorker(config)` does. Raises ConfigError, naming the field, and
        ModelLoadError.
        """
        parsed = WorkerState.from_json(state)
        return cls(parsed.model, parsed.worker, loader=loader)

    def metrics(self) -> Metrics:
        """Everything counted since the worker started. Never waits."""
        return metrics_of(self._service)

    def cache_metrics(self) -> CacheMetrics:
        """How full the KV cache of the loaded model is, and how well it is reused. Never waits."""
        return cache_metrics_of(self._service)

    @property
    def loras(self) -> Mapping[str, LoraInfo]:
        """The LoRA adapters that requests may name now. Waits for loading."""
        return self._view().loras

    def lora_metrics(self) -> dict[str, LoraMetrics]:
        """What each LoRA adapter was used for since the worker started, by name. Never waits."""
        return lora_metrics_of(self._service)

    def health(self) -> Health:
        """Whether it serves, and if not as it should, why. Never waits."""
        return health_of(self._service, inherited=self._desk.is_inherited)

    def diagnostics(self) -> dict[str, Any]:
        """What a bug report should say, as a dict that json.dumps takes: no paths, no prompts. Never waits."""
        return diagnose(self._service, self.config, self._live_config)

    def tokenize(self, text: str) -> list[int]:
        """The ids of plain text, without BOS. Never waits for a generation."""
        ids: list[int] = self._view().tokenize(text).tolist()
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises InvalidRequestError."""
        return self._view().detokenize(ids)

    def count_tokens(self, prompt: str | Sequence[MessageLike], tools: Sequence[ToolLike] = ()) -> int:
        """How many tokens a text has, or a conversation with `tools` when the model's template has rendered it.

        Never waits for a generation. Raises TemplateError and InvalidRequestError.
        """
        if not isinstance(prompt, str):
            return len(self._view().chat_tokens(core_messages(prompt), core_tools(tools)))
        if tools:
            raise InvalidRequestError("tools", f"<{len(tools)} tools>", "a plain text has none; give messages")
        return len(self._view().tokenize(prompt))

    # -- generating ---------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> Reply:
        """Answer `prompt`. Blocks. `session` and `priority` say when its turn is: see GenerationRequest.

        Raises RequestError, QueueFull, DeadlineExceeded (`timeout` seconds, waiting included),
        GenerationCancelled (with the partial reply), GenerationError, ModelLoadError, WorkerClosed.
        """
        with self._open(generation_request(prompt, timeout, sampling, session, priority), LastWord()) as stream:
            return stream.reply()

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> EventStream:
        """Answer `prompt` piece by piece. Blocks while the channel is full; raises as `generate`.

        What goes wrong after the request was accepted is the stream's last event, Failed.
        """
        return self._open(generation_request(prompt, timeout, sampling, session, priority), Mailbox())

    def _open(self, request: GenerationRequest, mailbox: Mailbox) -> EventStream:
        cancel, deadline = self._desk.new_flag(request.timeout)
        self._desk.submit(request, mailbox, cancel, deadline)
        return EventStream(mailbox, cancel, deadline, owner=self)

    async def agenerate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> Reply:
        """The async twin of `generate`. Never blocks the event loop, also not while the model loads."""
        async with self.astream(prompt, timeout=timeout, session=session, priority=priority, **sampling) as stream:
            return await stream.reply()

    def astream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> AsyncEventStream:
        """The async twin of `stream`: `async for event in worker.astream(...)`.

        The request is checked here and submitted by the first step of the iteration, which raises what
        preparing it raises.
        """
        request = generation_request(prompt, timeout, sampling, session, priority)
        cancel, deadline = self._desk.new_flag(request.timeout)
        start = partial(self._desk.asubmit, request, cancel=cancel, deadline=deadline)
        return AsyncEventStream(start, cancel, deadline, owner=self)

    def infer_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        timeout: float | None = None,
        max_concurrency: int | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> list[Reply | Exception]:
        """Answer many prompts: in their order, each with its Reply or with what `generate` would raise. Blocks.

        All are submitted by this thread, as fast as there is room, so the batch is one client among others and
        never has more than one caller waiting; with `max_concurrency` at most so many are under way. `timeout` is
        counted from this call for each. What interrupts the call cancels them all. Raises InvalidRequestError
        for what is wrong with all of them.
        """
        batch = self._batch(prompts, timeout, max_concurrency, session, priority, sampling)
        return batch.run(self._desk.submit)

    async def ainfer_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        timeout: float | None = None,
        max_concurrency: int | None = None,
        session: str | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> list[Reply | Exception]:
        """The async twin of `infer_batch`. Never blocks the event loop; cancelling the task cancels them all."""
        batch = self._batch(prompts, timeout, max_concurrency, session, priority, sampling)
        return await batch.arun(self._desk.asubmit)

    def _batch(
        self,
        prompts: Sequence[Prompt],
        timeout: float | None,
        max_concurrency: int | None,
        session: str | None,
        priority: int,
        sampling: Mapping[str, Any],
    ) -> Batch:
        def ask(prompt: Prompt) -> GenerationRequest:
            return generation_request(prompt, timeout, sampling, session, priority)

        ask("")  # what is wrong with all of them is said at once
        return Batch(prompts, ask, self._desk.new_flag, max_concurrency, self._desk.would_refuse)

    # -- sessions -----------------------------------------------------------------------------------

    def session(
        self,
        name: str | None = None,
        *,
        enable_thinking: bool | None = None,
        template_variables: Mapping[str, Any] | None = None,
        loras: Any = None,
        priority: int = 0,
    ) -> Session:
        """A Session: a conversation whose prefix is computed and kept when you say so. Never waits.

        `name` is the `session` of its requests; without one it is drawn. The others are those of GenerationRequest, for
        all that the session says. Raises InvalidRequestError.
        """
        return Session(
            self._desk,
            self._transfer,
            self,
            name,
            enable_thinking=enable_thinking,
            template_variables=template_variables,
            loras=loras,
            priority=priority,
        )

    def warm(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[ToolLike] = (),
        *,
        loras: Any = None,
        timeout: float | None = None,
    ) -> PrefixStatus:
        """Compute what all conversations that begin with `messages` and `tools` have in common, for the next ones.

        Blocks; raises as `generate`. Nothing is pinned: for that, open a session.
        """
        with self.session(loras=loras) as session:
            return session.ensure_prefix(messages, tools, timeout=timeout)

    async def awarm(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[ToolLike] = (),
        *,
        loras: Any = None,
        timeout: float | None = None,
    ) -> PrefixStatus:
        """The async twin of `warm`."""
        with self.session(loras=loras) as session:
            return await session.aensure_prefix(messages, tools, timeout=timeout)

    # -- embedding ----------------------------------------------------------------------------------

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        overlong: Literal["error", "truncate"] = "error",
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
    ) -> list[list[float]]:
        """One vector of n_embd floats for each text, in order. Blocks; raises as `generate`."""
        request = embed_request(texts, normalize, overlong, timeout, session, priority)
        return self._desk.embed(request) if request.texts else []

    async def aembed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        overlong: Literal["error", "truncate"] = "error",
        timeout: float | None = None,
        session: str | None = None,
        priority: int = 0,
    ) -> list[list[float]]:
        """The async twin of `embed`. Never blocks the event loop."""
        request = embed_request(texts, normalize, overlong, timeout, session, priority)
        return await self._desk.aembed(request) if request.texts else []

    # -- the worker itself --------------------------------------------------------------------------

    def reload(
        self,
        config: ModelConfig | str | None = None,
        *,
        when: Literal["drain", "now"] = "drain",
        timeout: float | None = None,
        overlap: bool | Literal["auto"] = False,
        progress: Callable[[float], object] | None = None,
        **changes: Any,
    ) -> None:
        """Serve another model, or the same one otherwise configured. Blocks until it serves.

        `config` replaces every field, `changes` only those named. Requests that run are finished first
        ("drain"; cancelled when that has taken `timeout` seconds) or cancelled ("now"); those that wait keep their
        place and run on the new model. What can be checked is checked while the old model serves on;
        a worker that chats refuses a model that only embeds.
        With `overlap` the new model is loaded beside the old one, which serves on until then; "auto" does
        so when both fit into memory. `progress` is called with the fraction that is loaded, by the
        loading thread. Raises ConfigError, ModelLoadError (`previous_restored` says whether the old model serves on)
        and WorkerClosed.
        """
        self._reload(config, when, timeout, overlap, progress, changes).answer.result()

    async def areload(
        self,
        config: ModelConfig | str | None = None,
        *,
        when: Literal["drain", "now"] = "drain",
        timeout: float | None = None,
        overlap: bool | Literal["auto"] = False,
        progress: Callable[[float], object] | None = None,
        **changes: Any,
    ) -> None:
        """The async twin of `reload`. A task that is cancelled here does not stop the reload."""
        self._desk.check_process()
        begun = self._preparer.submit(lambda: self._reload(config, when, timeout, overlap, progress, changes))
        command = await asyncio.shield(asyncio.wrap_future(begun))
        await asyncio.shield(asyncio.wrap_future(command.answer))

    def add_lora(self, name: str, path: str | Path) -> None:
        """Offer the LoRA adapter in a GGUF file under `name`, beside those there are. Blocks until it is read.

        Requests that run meanwhile wait as long as that takes. A name that is taken means the new file from now
        on; requests that have begun finish with the old one. `config.lora_paths` has it too, so a reload that
        changes other fields keeps it.

        Raises LoraLoadError, ConfigError, InsufficientMemoryError, and ModelNotFoundError when the model's own file,
        which it is held against, is not any more where it was loaded from; then nothing has changed.
        """
        self._change_lora(name, path).answer.result()

    async def aadd_lora(self, name: str, path: str | Path) -> None:
        """The async twin of `add_lora`."""
        await self._achange_lora(name, path)

    def remove_lora(self, name: str) -> None:
        """Offer the LoRA adapter `name` no longer. Requests that have begun with it finish, and then its memory is
        given back; those that still wait in the queue fail with InvalidRequestError, as new ones do. It helps too
        where an idle model cannot be loaded again because the adapter's file is gone.

        Raises InvalidRequestError for a name that is not loaded.
        """
        self._change_lora(name, None).answer.result()

    async def aremove_lora(self, name: str) -> None:
        """The async twin of `remove_lora`."""
        await self._achange_lora(name, None)

    def _change_lora(self, name: str, path: str | Path | None) -> ChangeLora:
        view = self._view()
        if path is not None:
            config = with_paths(view.config, {name: os.fspath(path)})
            if self._loads_llama and view.limits.n_loras:
                check_loras(config, view.info)  # what can be seen here costs no running request any time
        command = ChangeLora(name=name, path=None if path is None else os.fspath(path))
        if not self._channel.command(command):
            raise self._published.why_closed()
        return command

    async def _achange_lora(self, name: str, path: str | Path | None) -> None:
        self._desk.check_process()
        begun = self._preparer.submit(lambda: self._change_lora(name, path))
        change = await asyncio.shield(asyncio.wrap_future(begun))
        await asyncio.shield(asyncio.wrap_future(change.answer))

    def reconfigure(self, **changes: Any) -> None:
        """Change `queue_size`, `on_full`, `step_budget_ms` or `keep_alive` of the running worker. Never waits.

        A smaller queue_size drops nobody who waits already. Raises ConfigError; then nothing has changed.
        """
        self._desk.check_process()
        self._live_config = reconfigured(self._live_config, changes)
        apply_live(self._live_config, self._service, self._admission)

    def warmup(self) -> float:
        """Answer a word nobody asked for, so that the first request does not pay for what is done once.

        Blocks, until the model is loaded if need be; returns the seconds that it took. Raises as `generate`.
        """
        started = time.monotonic()
        view = self._view()
        view.warm()
        if view.limits.generates:
            self.generate(_WARM_UP, max_tokens=2, temperature=0.0, ignore_eos=True)
        else:
            self.embed([_WARM_UP])
        return time.monotonic() - started

    async def awarmup(self) -> float:
        """The async twin of `warmup`."""
        started = time.monotonic()
        if await self._desk.prepared(_warmed, None, None):
            await self.agenerate(_WARM_UP, max_tokens=2, temperature=0.0, ignore_eos=True)
        else:
            await self.aembed([_WARM_UP])
        return time.monotonic() - started

    def export(self, path: str | Path | None = None) -> Path:
        """Let other processes of this user watch the worker (`python -m llama_worker top`) until it ends.

        Returns the Unix socket, `path` or one in the user's runtime folder. What goes out carries no texts.
        Raises ConfigError when no socket can be made there, UnsupportedFeatureError where there are none.
        """
        self._desk.check_process()
        service, name = self._service, _name(self._service, self._published)
        exporter = Exporter(lambda: state_of(service, name), path)
        service.ended.add_done_callback(lambda _: exporter.close())
        return exporter.path

    def export_cache(self, folder: str | Path | None = None) -> int:
        """Write the states of everything that is kept, in slots and in RAM, into `folder`, or the model's cache_dir.

        They stay kept here. A worker with the same model and settings, in this process or another, can `import_cache`
        them, or be opened with that folder as its cache_dir. Returns how many prefixes there are. Blocks; running
        requests wait while states are copied, not while they are written, and all copies are in memory until they are;
        the model's file is read once for its digest. In the model's own cache_dir all files keep to `cache_disk`.
        Raises InvalidRequestError without a folder, OSError, UnsupportedFeatureError for a model without states,
        ModelNotFoundError when its file is not any more where it was loaded from, and what `info` raises.
        """
        return self._transfer.export_cache(self._view(), folder).result()

    async def aexport_cache(self, folder: str | Path | None = None) -> int:
        """The async twin of `export_cache`."""
        view = await self._desk.prepared(_itself, None, None)
        return await asyncio.wrap_future(self._transfer.export_cache(view, folder))

    def import_cache(self, folder: str | Path | None = None) -> int:
        """Take what `export_cache` wrote, or another worker's cache_dir, into RAM, as much as cache_ram holds.

        What is damaged, or another model's, template's or setting's, is left out. Returns how many prefixes are kept.
        An idle model that was let go is loaded for it, and a reload is waited for. Blocks and raises as `export_cache`;
        InvalidRequestError too for a folder that does not exist.
        """
        return self._transfer.import_cache(self._view(), folder).result()

    async def aimport_cache(self, folder: str | Path | None = None) -> int:
        """The async twin of `import_cache`."""
        view = await self._desk.prepared(_itself, None, None)
        return await asyncio.wrap_future(self._transfer.import_cache(view, folder))

    def cancel_all(self) -> None:
        """Cancel every request that is queued or running now. Never blocks."""
        self._desk.cancel_all()

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

    def _reload(
        self,
        config: ModelConfig | str | None,
        when: Literal["drain", "now"],
        timeout: float | None,
        overlap: bool | Literal["auto"],
        progress: Callable[[float], object] | None,
        changes: Mapping[str, Any],
    ) -> Reload:
        self._desk.check_process()
        if when not in ("drain", "now"):
            raise InvalidRequestError("when", when, "it is 'drain' or 'now'")
        if overlap not in (True, False, "auto"):
            raise InvalidRequestError("overlap", overlap, "it is True, False or 'auto'")
        # What was asked for last, which is more than what is served where that was made to fit.
        wanted = _changed(self._service.config if config is None else _model_config(config), changes)
        beside = check_reload(wanted, self._published.current, overlap) if self._loads_llama else bool(overlap)
        command = Reload(
            config=wanted,
            when=when,
            timeout=timeout,
            overlap=beside,
            progress=progress,
            noted=self._service.meter.reloaded,
        )
        if not self._channel.command(command):
            raise self._published.why_closed()
        return command

    def _shut_down(self) -> None:
        if not self._desk.is_inherited:
            _exit.interrupt(self._service)


def _itself(view: ModelView) -> ModelView:
    return view


def _warmed(view: ModelView) -> bool:
    """Warm `view`; whether it generates."""
    view.warm()
    return view.limits.generates


def _name(service: Service, published: Published) -> str:
    """The model's, without its path; waits for nothing."""
    view = published.current
    return PurePath(service.config.model).stem if view is None else view.info.name


def _observed(
    service: Service, published: Published, request: GenerationRequest | EmbedRequest
) -> AbstractContextManager[Record]:
    listeners: list[Listener] = [service.meter.answered]
    if isinstance(request, GenerationRequest) and request.loras:
        listeners.append(lambda answer, _: service.loras.answered(request, answer))
    return observed(request, _name(service, published), *listeners)


def _model_config(config: ModelConfig | str) -> ModelConfig:
    return ModelConfig(model=config) if isinstance(config, str) else config


def _changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**{**{name: getattr(config, name) for name in ModelConfig.model_fields}, **changes})
