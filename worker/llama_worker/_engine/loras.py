"""Loras: the LoRA adapters of one model, as llama.cpp holds them, and the set that its context computes with."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from llama_worker._engine.base import LoraInfo, ModelInfo
from llama_worker._engine.layout import read_layout
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.log import collected_log, error_lines
from llama_worker._engine.lora_file import LoraFile, existing_lora, read_lora, require_fit
from llama_worker._errors import InsufficientMemoryError, LoraLoadError
from llama_worker._free_memory import free_ram_bytes
from llama_worker._identity import KVIdentity
from llama_worker._models import model_files

MOST: Final = 8
"""Adapters of one request."""

# llama.cpp has room in its compute graph for every adapter that is loaded, but not for these architectures
# (llama_context::graph_max_nodes): there it ends the process when the graph is full.
_WITHOUT_ROOM: Final = frozenset(
    {
        "bailingmoe3",
        "deepseek4",
        "dflash",
        "glm5-next",
        "hrm_text",
        "hy_v4",
        "kimi-k3",
        "kimi-linear",
        "minimax-01",
        "minimax-m3",
        "nanbeige",
        "qwen35",
        "qwen35moe",
        "qwen3next",
        "qwen4exp",
    }
)


def most_loras(info: ModelInfo) -> int:
    """`EngineLimits.n_loras` of a model that generates."""
    return 1 if info.architecture in _WITHOUT_ROOM else MOST


def checked_lora(path: str, info: ModelInfo) -> LoraFile:
    """The adapter at `path`, which fits the model of `info`. Any thread. Raises LoraLoadError."""
    lora = read_lora(existing_lora(path))
    require_fit(lora, info.architecture, read_layout(model_files(Path(info.path))).tensors)
    return lora


class Loras:
    """The adapters of one model by their digests. The engine's thread; the model frees what is left."""

    def __init__(self, lib: Library, model: Pointer, context: Pointer, info: ModelInfo) -> None:
        self._api, self._model, self._context, self._info = lib.api, model, context, info
        self._held: dict[str, Pointer] = {}

    def load(self, path: str) -> LoraInfo:
        """See `base.Engine.load_lora`."""
        info = checked_lora(path, self._info).info
        if info.digest in self._held:
            return info
        free = free_ram_bytes()
        if info.size > free:
            raise InsufficientMemoryError(
                f"{Path(path).name} takes {info.size} bytes, {free} are free", needed=info.size, available=free
            )
        with collected_log() as lines:
            adapter = self._api.llama_adapter_lora_init(self._model, os.fsencode(info.path))
        if not adapter:
            raise LoraLoadError(Path(path).name, error_lines(lines))
        self._held[info.digest] = adapter
        return info

    def free(self, digest: str) -> None:
        """Forget an adapter that is not in use."""
        adapter = self._held.pop(digest, None)
        if adapter is not None:
            self._api.llama_adapter_lora_free(adapter)

    def use(self, kv: KVIdentity) -> None:
        """Compute with these from the next decode on. Raises ValueError for one that is not loaded."""
        unknown = next((digest for digest, _ in kv.loras if digest not in self._held), None)
        if unknown is not None:
            raise ValueError(f"the adapter {unknown} is not loaded")
        n = len(kv.loras)
        adapters = (self._api.llama_adapter_lora_p_ctypes * n)(*(self._held[digest] for digest, _ in kv.loras))
        scales = (ctypes.c_float * n)(*(scale for _, scale in kv.loras))
        self._api.llama_set_adapters_lora(self._context, adapters, n, scales)
