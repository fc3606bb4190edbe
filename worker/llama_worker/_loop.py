"""The worker thread: run() serves commands until Shutdown; step() is one round of it.

Both are plain functions over a Service, so that tests can drive every step without a thread. Only this
module and those that it calls (_decoding with _kv_ops, _embedding, _reloading, _lora_changes) touch an Engine.

A fault of one request (its sampler, its text) becomes that request's Failed. An error code of the engine
fails the requests of that batch. An exception of the engine ends the loop, and everyone is answered with
WorkerDied.
"""

from __future__ import annotations

import logging
from typing import assert_never

from llama_worker._commands import ChangeLora, Embed, Export, Generate, Import, Reload, Request, Shutdown, settle
from llama_worker._decoding import generate
from llama_worker._disk_line import line
from llama_worker._embedding import embed
from llama_worker._errors import (
    DeadlineExceeded,
    LlamaWorkerError,
    StreamStalled,
    WorkerClosed,
    WorkerDied,
    copy_of,
)
from llama_worker._generation import Generation
from llama_worker._lora_changes import change_loras
from llama_worker._loras import are_known
from llama_worker._reloading import begin_loading, begin_reload, continue_change, let_go, unload
from llama_worker._service import Loaded, Service, State
from llama_worker._stall import StallWatch
from llama_worker._transfers import serve_transfers, wants_model

logger = logging.getLogger("llama_worker")

_IDLE_LOOK = 1.0  # seconds between two looks at the clock when there is nothing to do
_FAREWELL = 10.0  # seconds that the end waits for the disk


def run(service: Service) -> None:
    """Load the model and serve until Shutdown. The body of the worker thread."""
    cause: BaseException | None = None
    try:
        begin_loading(service, service.config)
        while step(service):
            pass
    except BaseException as exc:  # noqa: BLE001  whatever it is, everyone waiting must hear of it
        cause = exc
    finally:
        end(service, cause)


def step(service: Service) -> bool:
    """One round: commands, cancellations, one decode, one batch of embeddings. False after Shutdown."""
    if service.channel.has_controls and not _obey(service):
        return False
    _answer_ended(service)
    if service.lora_changes or (service.loaded is not None and service.loaded.leaving):
        change_loras(service)
    if service.transfers and wants_model(service):
        begin_loading(service, service.config)
    if service.change is not None and continue_change(service, service.change):
        return True
    if service.transfers:
        serve_transfers(service)
    _take_requests(service)
    loaded = service.loaded
    if loaded is None or loaded.is_idle:
        _rest(service)
        return True
    service.idle_since = None
    generate(service, loaded)
    if loaded.embeds:
        embed(service, loaded)
    service.n_steps += 1
    service.meter.last_step = service.clock()
    return True


def _rest(service: Service) -> None:
    """Wait for something to do; let an idle model go when its time is up."""
    now = service.clock()
    if service.idle_since is None:
        service.idle_since = now
        if service.loaded is not None:
            service.loaded.engine.rest()
    since = service.idle_since
    if service.keep_alive is None or service.loaded is None or service.preparing or service.renewed:
        service.channel.wait(_IDLE_LOOK)
    elif now - since < service.keep_alive:
        service.channel.wait(min(_IDLE_LOOK, service.keep_alive - (now - since)))
    else:
        let_go(service)


def _obey(service: Service) -> bool:
    for control in service.channel.controls():
        match control:
            case Shutdown():
                return False
            case Reload():
                begin_reload(service, control)
            case ChangeLora():
                service.lora_changes.append(control)
            case Export() | Import():
                service.transfers.append(control)
            case _:
                assert_never(control)
    return True


def _take_requests(service: Service) -> None:
    """Move requests to where they are served, as many as there is room for; the renewed ones first."""
    if service.preparing:
        _collect_renewed(service)
    while service.renewed and _place(service, service.renewed[0]):
        service.renewed.pop(0)
    # Only so many are prepared again at once: the others keep their turns, and their places count, in the channel.
    while not service.renewed and service.channel.queued and len(service.preparing) < service.channel.capacity:
        request = service.channel.peek()
        if _would_overtake(service, request) or not _place(service, request):
            return
        service.channel.take(request)


def _would_overtake(service: Service, request: Request) -> bool:
    """Whether it is ready while others, who came before it, are being prepared again."""
    loaded = service.loaded
    return bool(service.preparing) and loaded is not None and request.job.epoch == loaded.view.epoch


def _place(service: Service, request: Request) -> bool:
    """Enter `request` into its next container, or refuse it. False when it has to stay where it is."""
    loaded = service.loaded
    if loaded is None:
        if service.refusal is None:  # let go while it was idle
            begin_loading(service, service.config)
            return False
        request.fail(copy_of(service.refusal))
    elif _is_stale(request, loaded):
        service.preparing.append(request)
        service.preparer.renew(request, loaded.view, service.channel.nudge)
    elif isinstance(request, Embed) and loaded.embeds.has_room:
        loaded.embeds.add(request)
    elif isinstance(request, Generate) and loaded.scheduler.has_room:
        loaded.scheduler.add(request, loaded.view.vocabulary)
    else:
        return False
    return True


def _is_stale(request: Request, loaded: Loaded) -> bool:
    """Whether it was prepared for another model, or for adapters that are not loaded any more."""
    if request.job.epoch != loaded.view.epoch:
        return True
    return isinstance(request, Generate) and not are_known(request.job.kv, loaded.view.loras)


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
    if service.stalls is not None:
        _fail_stalled(service, loaded, service.stalls)
    for generation in [*loaded.scheduler.running, *loaded.scheduler.waiting]:
        if generation.cancel.is_set or service.is_past(generation.command.deadline):
            _end_early(loaded, generation)
    for embedding in loaded.embeds.requests():
        if _answer_if_ended(service, embedding):
            loaded.embeds.remove(embedding)


def _answer_if_ended(service: Service, request: Request) -> bool:
    if request.cancel.cancelled:
        request.answer_cancelled()
        return True
    if request.cancel.expired or service.is_past(request.deadline):
        request.fail(_exceeded(request))
        return True
    return False


def _end_early(loaded: Loaded, generation: Generation) -> None:
    if generation.is_cancelled:
        generation.finish("cancelled")
    else:
        generation.fail(_exceeded(generation.command))
    loaded.retire(generation)


def _fail_stalled(service: Service, loaded: Loaded, stalls: StallWatch) -> None:
    for generation in stalls.look([*loaded.scheduler.running, *loaded.scheduler.waiting], service.clock()):
        generation.fail(StreamStalled(stalls.timeout))
        loaded.retire(generation)


def _exceeded(request: Request) -> DeadlineExceeded:
    return DeadlineExceeded(request.job.request.timeout)


def end(service: Service, cause: BaseException | None) -> None:
    """Close the channel, answer everyone, free the model, wait for the disk. Nothing may keep a caller waiting here."""
    if service.parked:
        service.ended.result()  # the watchdog has answered everyone, or is about to
    else:
        dismiss(service, _last_words(service, cause), "closed" if cause is None else "dead")
    _free(service)
    line.flush(service.channel.nudge, _FAREWELL)  # of every model that this worker had
    service.change = None  # not before: until then the watchdog looks after the loading thread
    service.launch.close()
    service.preparer.close()
    settle(service.ended)


def _free(service: Service) -> None:
    change = service.change
    try:
        unload(service)
        if change is not None and change.loading is not None:
            change.loading.cancel()
            change.loading.join()
    except Exception:
        logger.exception("the model could not be freed in order")
    settle(service.freed)


def dismiss(service: Service, error: LlamaWorkerError, state: State) -> None:
    """Close the channel and answer everyone with `error`. The engine is not touched.

    Called by the worker thread, or by the watchdog when that thread was given up.
    """
    service.state = state
    service.refusal = error
    service.publish(error)  # before the channel wakes those who wait for room: they ask why
    requests, controls = service.channel.close()
    kept = [*service.preparing, *service.renewed, *service.lora_changes, *service.transfers]
    for waiting in [*requests, *controls, *kept]:
        waiting.fail(copy_of(error))
    if service.change is not None:
        service.change.answer(copy_of(error))
    loaded = service.loaded
    if loaded is not None:
        for generation in [*loaded.scheduler.running, *loaded.scheduler.waiting]:
            generation.fail(copy_of(error))
        for command in loaded.embeds.requests():
            command.fail(copy_of(error))


def _last_words(service: Service, cause: BaseException | None) -> LlamaWorkerError:
    if cause is None:
        return WorkerClosed()
    if service.epoch == 0 and isinstance(cause, LlamaWorkerError):
        return cause  # it never served: the load error itself is the answer
    died = WorkerDied(f"the worker thread ended by {type(cause).__name__}; open a new LlamaWorker")
    died.__cause__ = cause
    logger.error("the worker died", exc_info=cause)
    return died
