"""Loading, and changing the model under those who wait.

Never two models at once: the old one is freed before the new one is loaded. If the new one then cannot
be loaded, the old one is loaded again; if that fails too the worker lives on without a model, refusing
with the reason, until a later reload mends it.
"""

from __future__ import annotations

import logging

from llama_worker._commands import settle
from llama_worker._config import ModelConfig
from llama_worker._decoding import generate
from llama_worker._embedding import embed
from llama_worker._embeddings import EmbedQueue
from llama_worker._errors import ModelLoadError, TemplateError
from llama_worker._pace import Pace
from llama_worker._scheduler import Scheduler
from llama_worker._service import Loaded, Service
from llama_worker._view import ModelView

logger = logging.getLogger("llama_worker")


def load(service: Service, config: ModelConfig) -> None:
    """Load `config` into an empty service and publish it. Raises ModelLoadError."""
    model = service.loader(config)
    try:
        view = ModelView.of(model, config, service.epoch + 1)
    except TemplateError as exc:
        model.engine.close()
        raise ModelLoadError(str(exc)) from None
    service.epoch += 1
    limits = model.engine.limits
    service.loaded = Loaded(model.engine, view, Scheduler(limits, Pace(service.step_budget_ms)), EmbedQueue(limits))
    service.abort = model.engine.abort_flag.raise_
    service.config = config
    service.refusal = None
    service.state = "ready"
    service.publish(view)


def continue_reload(service: Service) -> None:
    """Swap as soon as nobody runs. Those who wait keep their place and run on the new model."""
    command, loaded = service.reloading, service.loaded
    assert command is not None
    if loaded is not None:
        if command.when == "now" or service.is_past(command.deadline):
            _cancel_running(loaded)
        if loaded.scheduler.has_begun or loaded.embeds.has_begun:
            generate(service, loaded, newcomers=False)
            embed(loaded)
            return
        _hand_over_waiting(service, loaded)
        unload(service)
    service.reloading = None
    error = _swap(service, command.config)
    settle(command.answer, error=error)


def _cancel_running(loaded: Loaded) -> None:
    for generation in [g for g in [*loaded.scheduler.running, *loaded.scheduler.waiting] if g.has_begun]:
        generation.finish("cancelled")
        loaded.retire(generation)
    for command in loaded.embeds.begun():
        command.answer_cancelled()
        loaded.embeds.remove(command)


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
    for command in loaded.embeds.requests():
        service.renewed.append(command)
        loaded.embeds.remove(command)


def unload(service: Service) -> None:
    """Free the model. Its view lives on as long as somebody holds it."""
    loaded, service.loaded, service.abort = service.loaded, None, None
    if loaded is not None:
        for generation in [*loaded.scheduler.running, *loaded.scheduler.waiting]:
            loaded.close_sampler(generation)
        loaded.engine.close()
