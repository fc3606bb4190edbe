"""Loading the first model, and changing it under those who wait.

    with no model, or after the old one is freed:   load -> serve
    reload:                    drain -> free -> load -> serve     (never two models in memory)
    reload with overlap:       load beside the old one -> drain -> swap

If a new model cannot be loaded the old one is kept or loaded again; if that fails too the worker lives on
without a model, refusing with the reason, until a later reload mends it.
"""

from __future__ import annotations

import logging
from itertools import takewhile
from pathlib import Path

from llama_worker._commands import Reload
from llama_worker._config import ModelConfig
from llama_worker._decoding import generate
from llama_worker._draft import DraftModel
from llama_worker._embedding import embed
from llama_worker._embeddings import EmbedQueue
from llama_worker._engine.progress import LoadProgress
from llama_worker._errors import LoraLoadError, ModelLoadError, copy_of
from llama_worker._loading import Loading
from llama_worker._pace import Pace
from llama_worker._progress_bar import progress_bar
from llama_worker._scheduler import Scheduler
from llama_worker._service import Change, Loaded, Service
from llama_worker._speculation import Speculation
from llama_worker._transfers import open_disk, shelve

logger = logging.getLogger("llama_worker")

_LOOK = 1.0  # seconds between two looks at the clock while a model is loaded and nobody is served


def begin_loading(service: Service, config: ModelConfig) -> None:
    """The first model, or one that was unloaded and is wanted again."""
    service.state = "loading"
    service.change = Change(config)


def begin_reload(service: Service, command: Reload) -> None:
    """Change to what `command` asks for; an earlier change that is not through is given up."""
    former = service.change
    if former is not None:
        if former.loading is not None:
            former.loading.cancel()
        former.answer(ModelLoadError("superseded by a later reload"))
    service.change = Change(command.config, command=command)
    if service.loaded is not None:
        service.state = "ready"  # an earlier change may have been draining it


def continue_change(service: Service, change: Change) -> bool:
    """Take the change as far as it goes now. True when this step is used up; False to serve on meanwhile."""
    if service.loaded is None:
        _advance_without_model(service, change)
        return True
    if change.overlaps:
        loading = change.loading or _start(service, change, change.config)
        if not loading.is_done:
            return False
        if loading.failure is not None:
            _end(service, change, _failed(loading.failure))
            return False
    service.state = "draining"
    if _drain(service, change, service.loaded):
        _hand_over_waiting(service, service.loaded)
        unload(service)
    return True


def _advance_without_model(service: Service, change: Change) -> None:
    loading = change.loading or _start(service, change, change.config)
    if not loading.is_done:
        service.state = "loading"
        _wake_when_cancelled(service)
        service.channel.wait(_LOOK)
    elif loading.failure is None:
        adopt(service, loading)
        _end(service, change, None if change.failure is None else _failed(change.failure))
    elif service.epoch == 0 and (change.command is None or change.failure is not None):
        raise loading.failure  # the first model: nobody can be served, and everybody hears why
    elif change.command is None:
        _stay_unloaded(service, change, loading.failure)
    elif change.failure is None:
        change.failure = loading.failure
        _start(service, change, service.config)
    else:
        _give_up(service, change, change.failure)


def _start(service: Service, change: Change, config: ModelConfig) -> Loading:
    report = None if change.command is None else change.command.progress
    progress = LoadProgress(report or progress_bar(Path(config.model).name))
    change.loading = Loading(service.loader, config, service.epoch + 1, progress)
    change.loading.start(service.launch, service.channel.nudge)
    return change.loading


def _wake_when_cancelled(service: Service) -> None:
    """Nobody computes for those in the channel, so their flags wake the worker itself."""
    for request in (*service.channel.requests(), *service.preparing, *service.renewed):
        request.cancel.arm(service.channel.nudge)


def adopt(service: Service, loading: Loading) -> None:
    """Serve the model that was loaded."""
    model, view = loading.take()
    limits = model.engine.limits
    service.epoch = view.epoch
    speculation = Speculation.of(limits, view.config.speculation)
    scheduler = Scheduler(limits, Pace(service.step_budget_ms), view.config.cache_ram << 20, speculation)
    disk = open_disk(service, view, scheduler)
    draft = None if model.draft is None else DraftModel(model.draft, view.vocabulary.end_tokens, limits.n_vocab)
    service.loaded = Loaded(model.engine, view, scheduler, EmbedQueue(limits), disk=disk, draft=draft)
    service.abort = service.loaded.abort
    service.config = loading.config  # what was asked for: the next load may find more memory free
    service.idle_since = None
    service.refusal = None
    service.state = "ready"
    service.publish(view)


def _drain(service: Service, change: Change, loaded: Loaded) -> bool:
    """Serve those who have begun, or cancel them when it is time. True when none is left."""
    command = change.command
    assert command is not None
    if change.drain_until is None and command.timeout is not None:
        change.drain_until = service.clock() + command.timeout
    if command.when == "now" or service.is_past(change.drain_until):
        _cancel_running(loaded)
    if not (loaded.scheduler.has_begun or loaded.embeds.has_begun):
        return True
    generate(service, loaded, newcomers=False)
    embed(service, loaded, newcomers=False)
    return False


def _cancel_running(loaded: Loaded) -> None:
    for generation in [g for g in [*loaded.scheduler.running, *loaded.scheduler.waiting] if g.has_begun]:
        generation.finish("cancelled")
        loaded.retire(generation)
    for command in loaded.embeds.begun():
        command.answer_cancelled()
        loaded.embeds.remove(command)


def _end(service: Service, change: Change, error: Exception | None) -> None:
    service.change = None
    if service.loaded is not None:
        service.state = "ready"
    change.answer(error)


def _failed(failure: Exception) -> ModelLoadError:
    logger.warning("a reload failed: %s: %s", type(failure).__name__, failure)
    error = ModelLoadError(f"{failure}; the former model serves on", previous_restored=True)
    error.__cause__ = failure
    return error


def _stay_unloaded(service: Service, change: Change, failure: Exception) -> None:
    """An idle model did not come back: those who wait hear why, and the next request tries again."""
    logger.error("the model could not be loaded again: %s", failure)
    service.state = "unloaded"
    _end(service, change, None)
    if isinstance(failure, LoraLoadError) and _load_without_removed(service):
        return
    for request in service.channel.requests():
        request.fail(copy_of(failure))
        service.channel.drop(request)
    for waiting in (*service.preparing, *service.renewed, *service.lora_changes, *service.transfers):
        waiting.fail(copy_of(failure))
    for held in (service.preparing, service.renewed, service.lora_changes, service.transfers):
        held.clear()


def _load_without_removed(service: Service) -> bool:
    """Whether the adapters that are to go next may be what is in the way: then the model is loaded without them.

    They are gone for good, even if it cannot be loaded all the same: else of two bad ones neither could go.
    """
    paths = dict(service.config.lora_paths)
    going = list(takewhile(lambda change: change.path is None and change.name in paths, service.lora_changes))
    if not going:
        return False
    names = {change.name for change in going}
    left = tuple((name, path) for name, path in service.config.lora_paths if name not in names)
    service.config = service.config.model_copy(update={"lora_paths": left})
    del service.lora_changes[: len(going)]
    service.state = "loading"
    service.change = Change(service.config, removals=tuple(going))
    return True


def _give_up(service: Service, change: Change, failure: Exception) -> None:
    logger.error("no model is loaded: %s", failure)
    service.state = "unloaded"
    service.refusal = ModelLoadError(f"no model is loaded: {failure}; reload() can mend it")
    service.refusal.__cause__ = failure
    service.publish(service.refusal)
    error = ModelLoadError(f"{failure}; the former model could not be restored either")
    error.__cause__ = failure
    _end(service, change, error)


def _hand_over_waiting(service: Service, loaded: Loaded) -> None:
    """Waiting requests were prepared for the old model: they come back from the preparer for the new one."""
    for generation in list(loaded.scheduler.waiting):
        service.renewed.append(generation.command)
        loaded.scheduler.retire(generation)
    for command in loaded.embeds.requests():
        service.renewed.append(command)
        loaded.embeds.remove(command)


def let_go(service: Service) -> None:
    """Free a model that nobody has used for long. Its view stays published, so the next request comes in."""
    logger.info("%s is unloaded until it is asked for", service.config.model)
    unload(service)
    service.state = "unloaded"
    service.idle_since = None


def unload(service: Service) -> None:
    """Free the model; what it kept goes to the disk, where there is one. Its view lives on while somebody holds it."""
    loaded, service.loaded, service.abort = service.loaded, None, None
    if loaded is not None:
        try:
            if service.state != "dead":
                shelve(loaded)
            for generation in [*loaded.scheduler.running, *loaded.scheduler.waiting]:
                loaded.close_sampler(generation)
        finally:
            loaded.close()
