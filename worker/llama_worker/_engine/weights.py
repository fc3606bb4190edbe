"""Reading the weights of a model, and which kinds of models are refused."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from llama_worker._config import ModelConfig
from llama_worker._engine.base import ModelInfo
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.log import collected_log, error_lines
from llama_worker._engine.progress import current_progress
from llama_worker._errors import ConfigError, ModelLoadError

_SPLIT_MODES: Final = {"none": 0, "layer": 1, "row": 2}
_LOAD_MODES: Final = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap_mlock": 3, "direct_io": 4}


def load_weights(lib: Library, stack: ExitStack, config: ModelConfig, path: Path) -> Pointer:
    """A model that `stack` frees. Blocks; tells the loading's progress. Raises ModelLoadError and ConfigError."""
    params, keep_alive = _params(lib.api, config)
    progress = current_progress()
    # A C callback cannot raise; its result says whether to go on.
    told = lib.api.llama_progress_callback(lambda fraction, _: progress.tell(fraction))
    params.progress_callback = told
    with collected_log() as lines:
        model = lib.api.llama_model_load_from_file(os.fsencode(path), params)
    del keep_alive
    if progress.is_cancelled and not model:
        raise ModelLoadError(f"loading {path.name} was cancelled")
    if not model:
        raise ModelLoadError(f"{path.name} could not be loaded: {error_lines(lines)}")
    stack.callback(lib.api.llama_model_free, model)
    return model


def _params(api: Any, config: ModelConfig) -> tuple[Any, object]:
    """The parameters, and what must stay alive while they are used."""
    params = api.llama_model_default_params()
    params.n_gpu_layers = config.n_gpu_layers
    params.main_gpu = config.main_gpu
    params.split_mode = _SPLIT_MODES[config.split_mode]
    params.load_mode = _LOAD_MODES[config.load_mode]
    if config.tensor_split is None:
        return params, None
    n_devices = api.llama_max_devices()
    if len(config.tensor_split) > n_devices:
        raise ConfigError("tensor_split", config.tensor_split, f"at most {n_devices} devices")
    shares = (ctypes.c_float * n_devices)(*config.tensor_split)
    params.tensor_split = shares
    return params, shares


def require_supported(api: Any, model: Pointer, info: ModelInfo) -> None:
    """Kinds of models that decode in another way; called like the others, they abort."""
    if api.llama_model_has_encoder(model) and api.llama_model_has_decoder(model):
        raise ModelLoadError(f"{info.name} ({info.architecture}) is an encoder-decoder model; open a decoder-only one")
    if api.llama_model_is_diffusion(model):
        raise ModelLoadError(f"{info.name} ({info.architecture}) is a diffusion model; open a causal one")
