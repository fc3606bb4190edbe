"""Making a configuration fit: fewer cells of context first, then fewer layers on devices, or a refusal."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from llama_worker._config import ModelConfig
from llama_worker._engine.base import LoraInfo, ModelInfo
from llama_worker._errors import InsufficientMemoryError, LoraLoadError, ModelLoadError
from llama_worker._free_memory import FreeMemory, free_memory
from llama_worker._memory import CELL_STEP, MemoryPlan, cells_asked, described, offloaded_layers, plan, planned
from llama_worker._models import ModelFile, read_info, resolve

logger = logging.getLogger("llama_worker")


def fit_to_memory(info: ModelInfo, config: ModelConfig) -> ModelConfig:
    """The configuration to load: `config` if it fits; with fit="auto" also one that is smaller, with a warning.

    Allocates nothing; milliseconds; any thread. Raises InsufficientMemoryError with the arithmetic and the
    way out, and what `described` raises.
    """
    file, free = described(Path(info.path), config), free_memory()
    smaller = _fitting_or_refused(file, config, free)
    opened, said = planned(file, smaller, free), []
    if smaller != config:
        wanted = planned(file, config, free)
        said.append(f"is opened with {_changes(config, smaller)}; as asked it {wanted.verdict}")
    if opened.lacks_room_to_save:
        said.append(opened.verdict)
    if said:
        logger.warning("%s %s", info.name, ". Now it ".join(said))
    return smaller


def require_fit(info: ModelInfo, config: ModelConfig, *, replacing: MemoryPlan | None = None, kept: int = 0) -> None:
    """Raise what `fit_to_memory` would raise when the model of the plan `replacing` has been freed, and with it the
    `kept` bytes of its saved states."""
    free = free_memory()
    if replacing is not None:
        free = free.with_returned(ram=replacing.needed_ram + kept, device=replacing.needed_device)
    _fitting_or_refused(described(Path(info.path), config), config, free)


def plan_of_serving(info: ModelInfo, config: ModelConfig, loras: Iterable[LoraInfo] = ()) -> MemoryPlan | None:
    """What a model that is loaded has taken, or None when its file is no longer there to tell.

    Where the file of an adapter is not, `loras` say what they take; with layers on devices nobody knows then where
    they lie, and they are not counted.
    """
    try:
        return plan(info, config)
    except LoraLoadError:
        alone = plan_of_serving(info, config.model_copy(update={"lora_paths": ()}))
        return alone if alone is None or alone.needed_device else _with_loras(alone, loras)
    except ModelLoadError:
        if config.draft_model is None:
            return None
        return plan_of_serving(info, config.model_copy(update={"draft_model": None}), loras)


def _with_loras(alone: MemoryPlan, loras: Iterable[LoraInfo]) -> MemoryPlan:
    n_bytes = sum({lora.digest: lora.size for lora in loras}.values())  # two names of one file share what is loaded
    return replace(alone, loras=n_bytes, needed_ram=alone.needed_ram + n_bytes)


def plan_of_loading(config: ModelConfig) -> MemoryPlan | None:
    """What a model that is being loaded may have taken so far, at most, or None when its file is no longer there."""
    try:
        return plan_of_serving(read_info(resolve(config.model)), config)
    except ModelLoadError:
        return None


def _fitting_or_refused(file: ModelFile, config: ModelConfig, free: FreeMemory) -> ModelConfig:
    if config.fit == "auto":
        return fitted(file, config, free)
    memory = planned(file, config, free)
    if not memory.fits:
        raise _refused(file.info, memory)
    return config


def fitted(file: ModelFile, config: ModelConfig, free: FreeMemory) -> ModelConfig:
    """`config` if it fits into `free`, else the largest like it that does. Pure.

    The KV cache shrinks, with n_ctx never below `n_ctx_min`; where even that is too much for the devices,
    layers stay in RAM, as few as possible. Raises InsufficientMemoryError when nothing fits.
    """
    if planned(file, config, free).fits:
        return config
    info, least = file.info, _least_cells(file.info, config)
    base = _fewer_layers(file, _with_cells(info, config, least), config, free)
    smallest = planned(file, _with_cells(info, base, least), free)
    if not smallest.fits:
        raise _refused(info, smallest, at_least=True)
    n_steps = _largest(
        _steps(least),
        _steps(cells_asked(info, config)),
        lambda n: planned(file, _with_cells(info, base, n * CELL_STEP), free).fits,
    )
    return _with_cells(info, base, n_steps * CELL_STEP)


def _fewer_layers(file: ModelFile, smallest: ModelConfig, config: ModelConfig, free: FreeMemory) -> ModelConfig:
    """`config` with as many layers on devices as there is room for beside the smallest cache."""
    memory = planned(file, smallest, free)
    if memory.needed_device <= (memory.free_device or 0):
        return config

    def have_room(n_layers: int) -> bool:
        memory = planned(file, smallest.model_copy(update={"n_gpu_layers": n_layers}), free)
        return memory.needed_device <= (memory.free_device or 0)

    n_layers = _largest(0, offloaded_layers(file.info, config), have_room)
    return config.model_copy(update={"n_gpu_layers": n_layers})


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest of `low` … `high` for which `holds`, which is true up to some number, and of `low`."""
    return low + bisect_left(range(low + 1, high + 1), True, key=lambda n: not holds(n))


def _least_cells(info: ModelInfo, config: ModelConfig) -> int:
    n_cells = cells_asked(info, config)
    return min(config.n_ctx_min, config.n_ctx or info.n_ctx_train or n_cells, n_cells)


def _steps(n_cells: int) -> int:
    return -(-n_cells // CELL_STEP)


def _with_cells(info: ModelInfo, config: ModelConfig, n_cells: int) -> ModelConfig:
    """`config` with a KV cache of `n_cells`, if it has more; no request may then use more either."""
    if n_cells >= cells_asked(info, config):
        return config
    if config.n_kv_cells is None:
        return config.model_copy(update={"n_ctx": n_cells})
    n_ctx = min(config.n_ctx or info.n_ctx_train or n_cells, n_cells)
    return config.model_copy(update={"n_kv_cells": n_cells, "n_ctx": n_ctx})


# --- saying so


def _changes(asked: ModelConfig, given: ModelConfig) -> str:
    fields = ("n_ctx", "n_kv_cells", "n_gpu_layers")
    pairs = ((name, getattr(asked, name), getattr(given, name)) for name in fields)
    return ", ".join(f"{name}={new} instead of {old}" for name, old, new in pairs if old != new)


def _refused(info: ModelInfo, memory: MemoryPlan, *, at_least: bool = False) -> InsufficientMemoryError:
    """The shortage of `memory` as an error: of RAM, or else of the devices."""
    even = ", even at its smallest," if at_least else ""
    of_ram = memory.needed_ram > memory.free_ram
    return InsufficientMemoryError(
        f"{info.name}{even} {memory.verdict}",
        needed=memory.needed_ram if of_ram else memory.needed_device,
        available=memory.free_ram if of_ram else memory.free_device or 0,
    )
