"""The worker thread: run() serves commands until Shutdown; step() is one round of it.

Both are plain functions over a Service, so that tests can drive every step without a thread. This is the
only module that calls an Engine.

At every instant an accepted request is reachable from exactly one container: the channel, `preparing`
(stale, with the preparer), `renewed` (back from it), the scheduler's waiting or running generations, or
the embedding queue. A request enters the next before it leaves the last; so whatever is raised at
whichever point, _end() finds it.

A fault of one request (its sampler, its text) becomes that request's Failed. An error code of the engine
fails the requests of that batch. An exception of the engine ends the loop, and everyone is answered with
WorkerDied.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, assert_never

from llama_worker._channel import CommandChannel
from llama_worker._commands import Embed, Reload, Request, Shutdown, settle
from llama_worker._config import ModelConfig
from llama_worker._embeddings import EmbedQueue
from llama_worker._engine.base import AbortFlag, DecodeStatus, Engine, Loader
from llama_worker._errors import (
    ContextOverflowError,
    DeadlineExceeded,
    GenerationError,
    LlamaWorkerError,
    ModelLoadError,
    WorkerClosed,
    WorkerDied,
    copy_of,
)
from llama_worker._events import FinishReason
from llama_worker._generation import Generation
from llama_worker._logprobs import logprob_of
from llama_worker._pace import Pace
from llama_worker._prefix_cache import Clear, KVOp, Share, Trim
from llama_worker._preparer import Preparer
from llama_worker._scheduler import Batch, Scheduler
from llama_worker._view import ModelView

logger = logging.getLogger("llama_worker")

_IDLE_LOOK = 1.0  # seconds between two looks at the clock when there is nothing to do

State = Literal["loading", "ready", "draining", "unloaded", "closed", "dead"]


@dataclass(slots=True, eq=False)
class Loaded:
    """A model that is being served: its engine, what callers see of it, and who is served."""

    engine: Engine
    view: ModelView
    scheduler: Scheduler
    embeds: EmbedQueue

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle and not self.embeds


@dataclass(slots=True, eq=False, weakref_slot=True)
class Service:
    """Everything that the worker thread works with. Other threads only read `state` and the counts."""

    channel: CommandChannel
    loader: Loader
    config: ModelConfig
    step_budget_ms: float
    preparer: Preparer
    publish: Callable[[ModelView | Exception], None]
    clock: Callable[[], float] = time.monotonic
    state: State = "loading"
    loaded: Loaded | None = None
    refusal: Exception | None = None
    reloading: Reload | None = None
    preparing: list[Request] = field(default_factory=list)
    renewed: list[Request] = field(default_factory=list)
    epoch: int = 0
    n_steps: int = 0
    n_aborts: int = 0
    ended: Future[None] = field(default_factory=Future)
    abort: Callable[[], None] | None = None


def run(service: Service) -> None:
    """Load the model and serve until Shutdown. The body of the worker thread."""
    cause: BaseException | None = None
    try:
        load(service, service.config)
        while step(service):
            pass
    except BaseException as exc:  # noqa: BLE001  whatever it is, everyone waiting must hear of it
        cause = exc
    finally:
        _end(service, cause)


def step(service: Service) -> bool:
    """One round: commands, cancellations, one decode, one batch of embeddings. False after Shutdown."""
    if not _obey(service):
        return False
    _answer_ended(service)
    if service.reloading is not None:
        _continue_reload(service)
    if service.reloading is None:
        _take_requests(service)
    loaded = service.loaded
    if loaded is None or loaded.is_idle:
        if service.reloading is None:
            service.channel.wait(_IDLE_LOOK)
        return True
    _generate(service, loaded)
    _embed(service, loaded)
    service.n_steps += 1
    return True


# -- loading and reloading ----------------------------------------------------------------------------


def load(service: Service, config: ModelConfig) -> None:
    """Load `config` into an empty service and publish it. Raises ModelLoadError."""
    model = service.loader(config)
    service.epoch += 1
    view = ModelView.of(model, config, service.epoch)
    limits = model.engine.limits
    service.loaded = Loaded(model.engine, view, Scheduler(limits, Pace(service.step_budget_ms)), EmbedQueue(limits))
    service.abort = model.engine.abort_flag.raise_
    service.config = config
    service.refusal = None
    service.state = "ready"
    service.publish(view)


def _continue_reload(service: Service) -> None:
    """Swap as soon as nobody runs. Those who wait keep their place and run on the new model."""
    command, loaded = service.reloading, service.loaded
    assert command is not None
    if loaded is not None:
        if command.when == "now" or _is_past(service, command.deadline):
            for generation in list(loaded.scheduler.running):
                generation.command.cancel.cancel()
            _answer_ended(service)
        if loaded.scheduler.has_begun or loaded.embeds.has_begun:
            _generate(service, loaded, newcomers=False)
            _embed(service, loaded)
            return
        _hand_over_waiting(service, loaded)
        unload(service)
    service.reloading = None
    error = _swap(service, command.config)
    settle(command.answer, error=error)


def _swap(service: Service, config: ModelConfig) -> Exception | None:
    """Load `config`, or else the former model again, or else refuse until the next reload."""
    former = service.config
    failure = _try_load(service, config)
    if failure is None:
        return None
    again = _try_load(service, former)
    if again is None:
        return ModelLoadError(f"{failure}; the former model serves on", previous_restored=True)
    service.state = "unloaded"
    service.refusal = ModelLoadError(f"no model is loaded: {failure}; reload() can mend it")
    service.publish(service.refusal)
    return ModelLoadError(f"{failure}; the former model could not be restored either: {again}")


def _try_load(service: Service, config: ModelConfig) -> Exception | None:
    try:
        load(service, config)
    except Exception as exc:  # noqa: BLE001  whatever a loader raises, the worker must live on
        logger.warning("loading %s failed: %s", type(exc).__name__, exc)
        return exc
    return None


def _hand_over_waiting(service: Service, loaded: Loaded) -> None:
    """Waiting requests were prepared for the old model: they come back from the preparer for the new one."""
    for generation in list(loaded.scheduler.waiting):
        service.renewed.append(generation.command)
        loaded.scheduler.retire(generation)
    for embed in loaded.embeds.requests():
        service.renewed.append(embed)
        loaded.embeds.remove(embed)


def unload(service: Service) -> None:
    """Free the model. Its view lives on as long as somebody holds it."""
    loaded, service.loaded, service.abort = service.loaded, None, None
    if loaded is not None:
        for generation in [*loaded.scheduler.running, *loaded.scheduler.waiting]:
            _close_sampler(generation)
        loaded.engine.close()


# -- commands -----------------------------------------------------------------------------------------


def _obey(service: Service) -> bool:
    for control in service.channel.controls():
        match control:
            case Shutdown():
                return False
            case Reload():
                if service.reloading is not None:
                    settle(service.reloading.answer, error=ModelLoadError("superseded by a later reload"))
                service.reloading = control
                service.state = "draining"
            case _:
                assert_never(control)
    return True


def _take_requests(service: Service) -> None:
    """Move requests to where they are served, as many as there is room for; the renewed ones first."""
    _collect_renewed(service)
    while service.renewed and _place(service, service.renewed[0]):
        service.renewed.pop(0)
    while not service.renewed and (request := service.channel.peek()) is not None and _place(service, request):
        service.channel.drop(request)


def _place(service: Service, request: Request) -> bool:
    """Enter `request` into its next container, or refuse it. False when it has to stay where it is."""
    loaded = service.loaded
    if loaded is None:
        request.fail(service.refusal or WorkerClosed())
    elif request.job.view is not loaded.view:
        service.preparing.append(request)
        service.preparer.renew(request, loaded.view, service.channel.nudge)
    elif isinstance(request, Embed):
        loaded.embeds.add(request)
    elif loaded.scheduler.has_room:
        loaded.scheduler.add(request, loaded.view.vocabulary)
    else:
        return False
    return True


def _collect_renewed(service: Service) -> None:
    for request, outcome in service.preparer.collect():
        if request not in service.preparing:
            continue  # answered meanwhile
        if isinstance(outcome, Exception):
            request.fail(outcome)
        else:
            service.renewed.append(outcome)
        service.preparing.remove(request)


def _answer_ended(service: Service) -> None:
    """Answer every request that was cancelled or whose deadline has passed, wherever it is."""
    for request in service.channel.requests() if service.channel.queued else ():
        if _answer_if_ended(service, request):
            service.channel.drop(request)
    for held in (service.preparing, service.renewed):
        held[:] = [request for request in held if not _answer_if_ended(service, request)]
    loaded = service.loaded
    if loaded is None:
        return
    for generation in [*loaded.scheduler.running, *loaded.scheduler.waiting]:
        if generation.command.cancel.is_set or _is_past(service, generation.command.deadline):
            _end_early(loaded, generation)
    for embed in loaded.embeds.requests():
        if _answer_if_ended(service, embed):
            loaded.embeds.remove(embed)


def _answer_if_ended(service: Service, request: Request) -> bool:
    if request.cancel.cancelled:
        request.answer_cancelled()
        return True
    if request.cancel.expired or _is_past(service, request.deadline):
        request.fail(_exceeded(request))
        return True
    return False


def _end_early(loaded: Loaded, generation: Generation) -> None:
    if generation.is_cancelled:
        generation.finish("cancelled")
    else:
        generation.fail(_exceeded(generation.command))
    _retire(loaded, generation)


def _exceeded(request: Request) -> DeadlineExceeded:
    return DeadlineExceeded(request.job.request.timeout)


def _is_past(service: Service, deadline: float | None) -> bool:
    return deadline is not None and service.clock() >= deadline


# -- generating ---------------------------------------------------------------------------------------


def _generate(service: Service, loaded: Loaded, *, newcomers: bool = True) -> None:
    """One decode for everyone who runs, and what is sampled from it."""
    scheduler = loaded.scheduler
    for generation, ops in scheduler.admit(newcomers=newcomers):
        _apply(loaded.engine, ops)
        _start(loaded, generation)
    _apply(loaded.engine, scheduler.make_room())
    batch = scheduler.plan()
    if batch is None:
        _fail_stuck(loaded)
        return
    batch = _decode(service, loaded, batch)
    if batch is not None:
        _sample(service, loaded, scheduler.commit(batch))


def _apply(engine: Engine, ops: Iterable[KVOp]) -> None:
    for op in ops:
        match op:
            case Clear(seq):
                engine.seq_clear(seq)
            case Trim(seq, length):
                if not engine.seq_trim(seq, length):
                    raise GenerationError(f"the engine could not trim sequence {seq} to {length} tokens")
            case Share(source, target, length):
                engine.seq_share(source, target, length)
            case _:
                assert_never(op)


def _start(loaded: Loaded, generation: Generation) -> None:
    """Give a newcomer its sampler. A preempted generation has one already, with its history."""
    if generation.sampler is not None:
        return
    job = generation.command.job
    try:
        generation.sampler = loaded.engine.new_sampler(job.request.params, job.prompt)
    except LlamaWorkerError as exc:
        generation.fail(exc)
        _retire(loaded, generation)


def _fail_stuck(loaded: Loaded) -> None:
    """Somebody runs but no row fits: with one generation left there is nobody to make room for it."""
    for generation in list(loaded.scheduler.running):
        n_ctx = loaded.engine.limits.n_ctx
        generation.fail(ContextOverflowError(stage="decode", resident=generation.n_resident, additional=1, n_ctx=n_ctx))
        _retire(loaded, generation)


def _decode(service: Service, loaded: Loaded, batch: Batch) -> Batch | None:
    """Decode `batch`, or the part of it that fits. Returns what was decoded; None when nothing was."""
    while True:
        status = _decode_armed(service, loaded, batch)
        if status is DecodeStatus.OK:
            return batch
        if status is DecodeStatus.KV_FULL:
            smaller = _relieve(loaded, batch)
            if smaller is None:
                return None
            batch = smaller
            continue
        if status is DecodeStatus.ABORTED:
            service.n_aborts += 1
            _resync(loaded, batch)
        else:
            _fail_batch(loaded, batch, status)
        return None


def _decode_armed(service: Service, loaded: Loaded, batch: Batch) -> DecodeStatus:
    """Decode with the abort flag within reach of whoever cancels one of the batch's requests.

    A model that cannot be trimmed loses every sequence of an aborted batch, so there it takes all of them.
    """
    engine, parts = loaded.engine, batch.parts
    flag = engine.abort_flag
    abort = flag.raise_ if engine.limits.can_trim else partial(_raise_if_all_cancelled, flag, parts)
    flag.clear()
    for generation in parts:
        generation.command.cancel.arm(abort)
    started = service.clock()
    try:
        status = engine.decode(batch.spans)
    finally:
        for generation in parts:
            generation.command.cancel.disarm()
    if status is DecodeStatus.OK:
        loaded.scheduler.observe(batch.n_rows, (service.clock() - started) * 1000)
    return status


def _raise_if_all_cancelled(flag: AbortFlag, parts: Iterable[Generation]) -> None:
    if all(generation.command.cancel.is_set for generation in parts):
        flag.raise_()


def _relieve(loaded: Loaded, batch: Batch) -> Batch | None:
    """The engine has no room for `batch` although the books said so: evict, halve, preempt, start over, fail."""
    scheduler = loaded.scheduler
    if (op := scheduler.cache.evict(batch.n_rows)) is not None:
        _apply(loaded.engine, [op])
        return batch
    if batch.n_rows > 1:
        return scheduler.plan(batch.n_rows // 2)
    if (op := scheduler.preempt()) is not None:
        _apply(loaded.engine, [op])
        return scheduler.plan(1)
    if (op := scheduler.start_over()) is not None:
        _apply(loaded.engine, [op])
        return scheduler.plan()
    _fail_stuck(loaded)
    return None


def _resync(loaded: Loaded, batch: Batch) -> None:
    """After an abort: keep what is computed, but no row whose logits were never read."""
    for span, generation in zip(batch.spans, batch.parts, strict=True):
        last = span.start + len(span.tokens) - int(span.output)
        keep = min(loaded.engine.seq_end(span.seq), last)
        # A state that cannot be cut back is corrupt after an abort, whatever length it claims.
        lost = keep < span.start or not loaded.engine.limits.can_trim
        if lost or not loaded.engine.seq_trim(span.seq, keep):
            loaded.engine.seq_clear(span.seq)
            keep = 0
        loaded.scheduler.resync(generation, span, keep)


def _fail_batch(loaded: Loaded, batch: Batch, status: DecodeStatus) -> None:
    logger.error("llama_decode returned %d for %d rows of %d sequences", status, batch.n_rows, len(batch.parts))
    for generation in batch.parts:
        assert generation.slot is not None
        generation.fail(GenerationError(f"llama_decode returned {int(status)} ({status.name.lower()})"))
        _apply(loaded.engine, [loaded.scheduler.cache.forget(generation.slot)])
        _retire(loaded, generation)


def _sample(service: Service, loaded: Loaded, outputs: Iterable[tuple[int, Generation]]) -> None:
    for row, generation in outputs:
        if not generation.command.cancel.is_set:
            _next_token(loaded, row, generation)


def _next_token(loaded: Loaded, row: int, generation: Generation) -> None:
    engine, vocabulary, command = loaded.engine, loaded.view.vocabulary, generation.command
    assert generation.sampler is not None
    wanted = command.job.request.params.logprobs
    logits = None if wanted is None else engine.logits(row).copy()  # samplers work in place
    token = engine.sample(row, generation.sampler)
    if token in vocabulary.end_tokens:
        _finish(loaded, generation, "stop")
        return
    logprob = None if logits is None or wanted is None else logprob_of(logits, token, wanted, vocabulary.pieces)
    generation.tokens.append(token)
    delta = generation.reply.feed(token, logprob)
    if delta is not None:
        command.sink.put(delta)
    reason = generation.end_reason()
    if reason is not None:
        _finish(loaded, generation, reason)


def _finish(loaded: Loaded, generation: Generation, reason: FinishReason) -> None:
    text, digest = generation.flush(), generation.command.job.prefix_digest
    if digest is not None:
        # Known before it is announced: the next turn may be prepared the moment the reply is read.
        loaded.view.replies.remember(digest, text, generation.sampled.copy())
    generation.finish(reason)
    _retire(loaded, generation)


def _retire(loaded: Loaded, generation: Generation) -> None:
    loaded.scheduler.retire(generation)
    _close_sampler(generation)


def _close_sampler(generation: Generation) -> None:
    sampler, generation.sampler = generation.sampler, None
    if sampler is not None:
        sampler.close()


# -- embedding ----------------------------------------------------------------------------------------


def _embed(service: Service, loaded: Loaded) -> None:
    """One batch of texts, of as many requests as fit together."""
    batch = loaded.embeds.next_batch()
    if not batch:
        return
    flag = loaded.engine.abort_flag
    flag.clear()
    commands = {id(text.command): text.command for text in batch}.values()
    for command in commands:
        command.cancel.arm(flag.raise_)
    try:
        vectors = loaded.engine.embed([text.tokens for text in batch])
    except GenerationError as exc:
        # A batch that was aborted for one of its requests is simply tried again without it.
        if not any(command.cancel.is_set for command in commands):
            loaded.embeds.fail(batch, exc)
    else:
        loaded.embeds.commit(batch, vectors)
    finally:
        for command in commands:
            command.cancel.disarm()


# -- the end ------------------------------------------------------------------------------------------


def _end(service: Service, cause: BaseException | None) -> None:
    """Close the channel, answer everyone, free the model. Nothing may keep a caller waiting here."""
    error = _last_words(service, cause)
    service.state = "closed" if cause is None else "dead"
    service.refusal = error
    requests, controls = service.channel.close()
    service.publish(error)
    for waiting in [*requests, *controls, *service.preparing, *service.renewed]:
        waiting.fail(copy_of(error))
    if service.reloading is not None:
        service.reloading.fail(copy_of(error))
    loaded = service.loaded
    if loaded is not None:
        for generation in [*loaded.scheduler.running, *loaded.scheduler.waiting]:
            generation.fail(copy_of(error))
        for embed in loaded.embeds.requests():
            embed.fail(copy_of(error))
    try:
        unload(service)
    except Exception:
        logger.exception("the model could not be freed in order")
    service.preparer.close()
    settle(service.ended)


def _last_words(service: Service, cause: BaseException | None) -> LlamaWorkerError:
    if cause is None:
        return WorkerClosed()
    if service.epoch == 0 and isinstance(cause, LlamaWorkerError):
        return cause  # it never served: the load error itself is the answer
    died = WorkerDied(f"the worker thread ended by {type(cause).__name__}; open a new LlamaWorker")
    died.__cause__ = cause
    logger.error("the worker died", exc_info=cause)
    return died
