"""Adapters that come and go while a model is served: between two steps, on the worker thread.

    add      read the file, then show the name to callers
    remove   hide the name; requests in the queue are prepared again, and refused; who runs with it finishes;
             then its memory is given back

Reading costs those who run as long as the file takes to read. A change that comes while another model is on its
way waits for that one, and a model that was unloaded is loaded for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_worker._commands import ChangeLora, settle
from llama_worker._config import ModelConfig
from llama_worker._engine.base import LoraInfo
from llama_worker._errors import LlamaWorkerError, copy_of
from llama_worker._loras import unknown
from llama_worker._reloading import begin_loading
from llama_worker._service import Loaded, Service


def change_loras(service: Service) -> None:
    """Carry out the changes that were asked for, as far as there is a model for them."""
    loaded = service.loaded
    if service.change is not None:
        return
    if loaded is None and service.refusal is None:
        begin_loading(service, service.config)
        return
    while service.lora_changes:
        change = service.lora_changes[0]
        if loaded is None:
            assert service.refusal is not None
            change.fail(copy_of(service.refusal))
        else:
            _carry_out(service, loaded, change)
        service.lora_changes.pop(0)
    if loaded is not None:
        sweep(loaded)


def sweep(loaded: Loaded) -> None:
    """Give back the memory of adapters that have no name any more and that nobody runs with."""
    named = {info.digest for info in loaded.view.loras.values()}
    generations = [*loaded.scheduler.running, *loaded.scheduler.waiting]
    used = {digest for generation in generations for digest, _ in generation.kv.loras}
    for digest in loaded.leaving - named - used:
        loaded.engine.free_lora(digest)
    loaded.leaving &= used - named


def _carry_out(service: Service, loaded: Loaded, change: ChangeLora) -> None:
    try:
        loras, config = _changed(loaded, change)
    except LlamaWorkerError as refused:
        change.fail(refused)
        return
    loaded.leaving |= {info.digest for info in loaded.view.loras.values()}  # what is still named stays
    service.config = service.config.model_copy(update={"lora_paths": config.lora_paths})
    loaded.view = loaded.view.with_loras(loras, config)
    service.publish(loaded.view)
    settle(change.answer)


def _changed(loaded: Loaded, change: ChangeLora) -> tuple[Mapping[str, LoraInfo], ModelConfig]:
    """The adapters and the configuration with `change`. Raises what is wrong with it; then nothing has changed."""
    loras, paths, config = dict(loaded.view.loras), dict(loaded.view.config.lora_paths), loaded.view.config
    if change.path is None:
        if change.name not in loras:
            raise unknown(change.name, loras)
        del loras[change.name], paths[change.name]
        return loras, with_paths(config, paths)
    config = with_paths(config, {**paths, change.name: change.path})
    return {**loras, change.name: loaded.engine.load_lora(change.path)}, config


def with_paths(config: ModelConfig, paths: Mapping[str, str | Path]) -> ModelConfig:
    """`config` with these adapters. Raises ConfigError."""
    given: Any = paths
    checked = ModelConfig(model=config.model, lora_paths=given)
    return config.model_copy(update={"lora_paths": checked.lora_paths})
