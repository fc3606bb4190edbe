"""LlamaWorker: a model on a thread of its own, and every way to ask something of it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar

from llama_worker import _exit
from llama_worker._admission import Admission
from llama_worker._cancel import CancelFlag, new_flag
from llama_worker._channel import CommandChannel
from llama_worker._commands import Embed, Generate, Reload, Shutdown
from llama_worker._config import ModelConfig, WorkerConfig
from llama_worker._engine.base import LoadedModel, Loader, ModelInfo
from llama_worker._errors import DeadlineExceeded, InvalidRequestError, WorkerClosed
from llama_worker._events import Reply
from llama_worker._jobs import EmbedJob
from llama_worker._loop import run
from llama_worker._preparer import Preparer
from llama_worker._prompts import MessageLike, Prompt, core_messages, embed_request, generation_request
from llama_worker._published import Published
from llama_worker._requests import GenerationRequest
from llama_worker._service import Service, State
from llama_worker._streams import AsyncEventStream, AsyncMailbox, EventStream, LastWord, Mailbox
from llama_worker._view import ModelView

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A snapshot of a worker, taken without waiting for it.

    `queued` requests are in the channel, `waiting` have no slot yet, `running` are being served,
    `callers_waiting` could not be accepted yet. `epoch` counts successful loads.
    """

    state: State
    model: str
    epoch: int
    queued: int
    callers_waiting: int
    waiting: int
    running: int
    embedding: int
    steps: int
    aborts: int
    cells_used: int
    cells: int


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
        self._start(_model_config(config), worker_config or WorkerConfig(), loader or _load_llama)
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
        worker._start(_model_config(config), worker_config or WorkerConfig(), loader or _load_llama)
        return worker

    def _start(self, config: ModelConfig, worker_config: WorkerConfig, loader: Loader) -> None:
        self._created_with = config
        self._worker_config = worker_config
        self._published = Published()
        self._channel = CommandChannel(worker_config.queue_size)
        self._admission = Admission(self._channel, worker_config.on_full, self._published.why_closed)
        self._preparer = Preparer()
        self._flags: weakref.WeakSet[CancelFlag] = weakref.WeakSet()
        self._flags_lock = threading.Lock()
        self._pid = os.getpid()
        self._service = Service(
            channel=self._channel,
            loader=loader,
            config=config,
            step_budget_ms=worker_config.step_budget_ms,
            preparer=self._preparer,
            publish=self._published.show,
        )
        self._thread = threading.Thread(target=run, args=(self._service,), name="llama-worker", daemon=True)
        _exit.watch(self._service, self._thread)
        # A worker that is dropped without close() ends too: its thread holds the service, not the worker.
        self._finalizer = weakref.finalize(self, self._channel.command, Shutdown())
        self._finalizer.atexit = False
        self._thread.start()

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
        from llama_worker._registry import get_worker

        return get_worker, (self._created_with, self._worker_config)

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
        """Whether it was closed or died: it will never serve again."""
        return self._service.state in ("closed", "dead")

    def status(self) -> Status:
        """A snapshot. Never waits."""
        service, loaded = self._service, self._service.loaded
        return Status(
            state=service.state,
            model=self.config.model if loaded is None else loaded.view.info.name,
            epoch=service.epoch,
            queued=self._channel.queued,
            callers_waiting=self._channel.waiting,
            waiting=0 if loaded is None else len(loaded.scheduler.waiting),
            running=0 if loaded is None else len(loaded.scheduler.running),
            embedding=0 if loaded is None else len(loaded.embeds),
            steps=service.n_steps,
            aborts=service.n_aborts,
            cells_used=0 if loaded is None else loaded.scheduler.cache.cells.n - loaded.scheduler.cache.cells.free,
            cells=0 if loaded is None else loaded.scheduler.cache.cells.n,
        )

    def tokenize(self, text: str) -> list[int]:
        """The ids of plain text, without BOS. Never waits for a generation."""
        ids: list[int] = self._view().tokenize(text).tolist()
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises InvalidRequestError."""
        return self._view().detokenize(ids)

    def count_tokens(self, prompt: str | Sequence[MessageLike]) -> int:
        """How many tokens a text has, or a conversation when the model's template has rendered it.

        Never waits for a generation. Raises TemplateError and InvalidRequestError.
        """
        if isinstance(prompt, str):
            return len(self._view().tokenize(prompt))
        return len(self._view().chat_tokens(core_messages(prompt)))

    # -- generating ---------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **sampling: Any) -> Reply:
        """Answer `prompt`. Blocks.

        Raises RequestError, QueueFull, DeadlineExceeded (`timeout` seconds, waiting included),
        GenerationCancelled (with the partial reply), GenerationError, ModelLoadError, WorkerClosed.
        """
        with self._open(generation_request(prompt, timeout, sampling), LastWord()) as stream:
            return stream.reply()

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **sampling: Any) -> EventStream:
        """Answer `prompt` piece by piece. Blocks while the channel is full; raises as `generate`.

        What goes wrong after the request was accepted is the stream's last event, Failed.
        """
        return self._open(generation_request(prompt, timeout, sampling), Mailbox())

    def _open(self, request: GenerationRequest, mailbox: Mailbox) -> EventStream:
        cancel, deadline = self._new_flag(request.timeout)
        view = self._view_until(deadline, request.timeout)
        job = view.prepare_generation(request)
        self._admission.put(Generate(job=job, sink=mailbox, cancel=cancel, deadline=deadline))
        return EventStream(mailbox, cancel, deadline, view.info.name, owner=self)

    async def agenerate(self, prompt: Prompt, *, timeout: float | None = None, **sampling: Any) -> Reply:
        """The async twin of `generate`. Never blocks the event loop, also not while the model loads."""
        async with self.astream(prompt, timeout=timeout, **sampling) as stream:
            return await stream.reply()

    def astream(self, prompt: Prompt, *, timeout: float | None = None, **sampling: Any) -> AsyncEventStream:
        """The async twin of `stream`: `async for event in worker.astream(...)`.

        The request is checked here and submitted by the first step of the iteration, which raises what
        preparing it raises.
        """
        request = generation_request(prompt, timeout, sampling)
        cancel, deadline = self._new_flag(request.timeout)
        names: list[str] = []
        start = partial(self._start_generation, request, cancel, deadline, names)
        return AsyncEventStream(start, cancel, deadline, lambda: names[0] if names else "")

    async def _start_generation(
        self,
        request: GenerationRequest,
        cancel: CancelFlag,
        deadline: float | None,
        names: list[str],
        mailbox: AsyncMailbox,
    ) -> None:
        job = await self._prepared(lambda view: view.prepare_generation(request), deadline, request.timeout)
        names.append(self.info.name)
        await self._admission.aput(Generate(job=job, sink=mailbox, cancel=cancel, deadline=deadline))

    # -- embedding ----------------------------------------------------------------------------------

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        overlong: Literal["error", "truncate"] = "error",
        timeout: float | None = None,
    ) -> list[list[float]]:
        """One vector of n_embd floats for each text, in order. Blocks; raises as `generate`."""
        request = embed_request(texts, normalize, overlong, timeout)
        if not request.texts:
            return []
        cancel, deadline = self._new_flag(timeout)
        command = _embed_command(self._view_until(deadline, timeout).prepare_embedding(request), cancel, deadline)
        try:
            self._admission.put(command)
            return _wait(command.answer, cancel, deadline)
        finally:
            cancel.cancel()

    async def aembed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        overlong: Literal["error", "truncate"] = "error",
        timeout: float | None = None,
    ) -> list[list[float]]:
        """The async twin of `embed`. Never blocks the event loop."""
        request = embed_request(texts, normalize, overlong, timeout)
        if not request.texts:
            return []
        cancel, deadline = self._new_flag(timeout)
        try:
            job = await self._prepared(lambda view: view.prepare_embedding(request), deadline, timeout)
            command = _embed_command(job, cancel, deadline)
            await self._admission.aput(command)
            return await _await_until(command.answer, cancel, deadline)
        finally:
            cancel.cancel()

    # -- the worker itself --------------------------------------------------------------------------

    def reload(
        self,
        config: ModelConfig | str | None = None,
        *,
        when: Literal["drain", "now"] = "drain",
        timeout: float | None = None,
        **changes: Any,
    ) -> None:
        """Serve another model, or the same one otherwise configured. Blocks until it serves.

        `config` replaces every field, `changes` only those named. Requests that run are finished first
        ("drain"; cancelled after `timeout` seconds) or cancelled ("now"); those that wait keep their
        place and run on the new model. What can be checked is checked while the old model serves on.
        Raises ConfigError, ModelLoadError (`previous_restored` says whether the old model serves on)
        and WorkerClosed.
        """
        self._reload(config, when, timeout, changes).answer.result()

    async def areload(
        self,
        config: ModelConfig | str | None = None,
        *,
        when: Literal["drain", "now"] = "drain",
        timeout: float | None = None,
        **changes: Any,
    ) -> None:
        """The async twin of `reload`. A task that is cancelled here does not stop the reload."""
        begun = self._preparer.submit(lambda: self._reload(config, when, timeout, changes))
        command = await asyncio.shield(asyncio.wrap_future(begun))
        await asyncio.shield(asyncio.wrap_future(command.answer))

    def cancel_all(self) -> None:
        """Cancel every request that is queued or running now. Never blocks."""
        with self._flags_lock:
            flags = list(self._flags)
        for flag in flags:
            flag.cancel()

    def close(self) -> None:
        """Answer everyone with WorkerClosed, free the model and end the thread. Blocks; idempotent."""
        self._shut_down()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def aclose(self) -> None:
        """The async twin of `close`."""
        self._shut_down()
        await asyncio.shield(asyncio.wrap_future(self._service.ended))

    # -- inside -------------------------------------------------------------------------------------

    def _new_flag(self, timeout: float | None) -> tuple[CancelFlag, float | None]:
        if os.getpid() != self._pid:
            raise WorkerClosed("this worker was inherited through fork(), without its thread; open a new one")
        flag, deadline = new_flag(timeout)
        with self._flags_lock:
            self._flags.add(flag)
        return flag, deadline

    def _view(self) -> ModelView:
        view = self._published.view()
        assert view is not None
        return view

    def _view_until(self, deadline: float | None, timeout: float | None) -> ModelView:
        view = self._published.view(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        if view is None:
            raise DeadlineExceeded(timeout)
        return view

    async def _prepared(self, prepare: Callable[[ModelView], T], deadline: float | None, timeout: float | None) -> T:
        task = self._preparer.submit(lambda: prepare(self._view_until(deadline, timeout)))
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(task), left)
        except TimeoutError:
            raise DeadlineExceeded(timeout) from None
        except WorkerClosed:
            raise self._published.why_closed() from None

    def _reload(
        self,
        config: ModelConfig | str | None,
        when: Literal["drain", "now"],
        timeout: float | None,
        changes: Mapping[str, Any],
    ) -> Reload:
        if when not in ("drain", "now"):
            raise InvalidRequestError("when", when, "it is 'drain' or 'now'")
        wanted = _changed(self.config if config is None else _model_config(config), changes)
        if self._service.loader is _load_llama:
            _check_model(wanted, self._published.current)
        deadline = None if timeout is None else time.monotonic() + timeout
        command = Reload(config=wanted, when=when, deadline=deadline)
        if not self._channel.command(command):
            raise self._published.why_closed()
        return command

    def _shut_down(self) -> None:
        _exit.interrupt(self._service)


def _model_config(config: ModelConfig | str) -> ModelConfig:
    return ModelConfig(model=config) if isinstance(config, str) else config


def _changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**{**{name: getattr(config, name) for name in ModelConfig.model_fields}, **changes})


def _load_llama(config: ModelConfig) -> LoadedModel:
    from llama_worker._engine.llama import load  # here, on the worker thread: it loads the shared library

    return load(config)


def _check_model(config: ModelConfig, serving: ModelView | None) -> None:
    """Everything that can be known to fail before the old model is let go."""
    from llama_worker._memory import check_fits, plan
    from llama_worker._models import read_info, resolve

    freed = 0 if serving is None else plan(serving.info, serving.config).needed
    check_fits(read_info(resolve(config.model)), config, freed=freed)


def _embed_command(job: EmbedJob, cancel: CancelFlag, deadline: float | None) -> Embed:
    return Embed(job=job, answer=Future(), cancel=cancel, deadline=deadline)


def _wait(answer: Future[T], cancel: CancelFlag, deadline: float | None) -> T:
    """The answer; when the deadline passes the flag is set, and the worker answers so."""
    if deadline is not None:
        try:
            return answer.result(max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            cancel.expire()
    return answer.result()


async def _await_until(answer: Future[T], cancel: CancelFlag, deadline: float | None) -> T:
    loop = asyncio.get_running_loop()
    timer = None if deadline is None else loop.call_later(max(deadline - time.monotonic(), 0.0), cancel.expire)
    try:
        return await asyncio.wrap_future(answer)
    finally:
        if timer is not None:
            timer.cancel()
