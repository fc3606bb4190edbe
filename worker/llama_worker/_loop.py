"""The worker thread: run() serves commands until Shutdown; step() is one round of it.

Both are plain functions over a Service, so that tests can drive every step without a thread. Only this
module and the three that it calls (_decoding, _embedding, _reloading) touch an Engine.

A fault of one request (its sampler, its text) becomes that request's Failed. An error code of the engine
fails the requests of that batch. An exception of the engine ends the loop, and everyone is answered with
WorkerDied.
"""

from __future__ import annotations

import logging
from typing import assert_never

from llama_worker._commands import Embed, Reload, Request, Shutdown, settle
from llama_worker._decoding import generate
from llama_worker._embedding import embed
from llama_worker._errors import (
    DeadlineExceeded,
    LlamaWorkerError,
    ModelLoadError,
    WorkerClosed,
    WorkerDied,
    copy_of,
)
from llama_worker._generation import Generation
from llama_worker._reloading import continue_reload, load, unload
from llama_worker._service import Loaded, Service

logger = logging.getLogger("llama_worker")

_IDLE_LOOK = 1.0  # seconds between two looks at the clock when there is nothing to do


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
        end(service, cause)


def step(service: Service) -> bool:
    """One round: commands, cancellations, one decode, one batch of embeddings. False after Shutdown."""
    if service.channel.has_controls and not _obey(service):
        return False
    _answer_ended(service)
    if service.reloading is not None:
        continue_reload(service)
        return True
    _take_requests(service)
    loaded = service.loaded
    if loaded is None or loaded.is_idle:
        service.channel.wait(_IDLE_LOOK)
        return True
    generate(service, loaded)
    if loaded.embeds:
        embed(loaded)
    service.n_steps += 1
    return True


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
    if service.preparing:
        _collect_renewed(service)
    while service.renewed and _place(service, service.renewed[0]):
        service.renewed.pop(0)
    while not service.renewed and service.channel.queued and _place(service, request := service.channel.peek()):
        service.channel.drop(request)


def _place(service: Service, request: Request) -> bool:
    """Enter `request` into its next container, or refuse it. False when it has to stay where it is."""
    loaded = service.loaded
    if loaded is None:
        request.fail(service.refusal or WorkerClosed())
    elif request.job.epoch != loaded.view.epoch:
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


def _exceeded(request: Request) -> DeadlineExceeded:
    return DeadlineExceeded(request.job.request.timeout)


def end(service: Service, cause: BaseException | None) -> None:
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
        for command in loaded.embeds.requests():
            command.fail(copy_of(error))
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
