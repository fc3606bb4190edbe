"""What both kinds of context share: the abort switch, the threads, creation."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any

from llama_worker._config import ModelConfig
from llama_worker._engine.library import Library, Pointer, native_strlen
from llama_worker._engine.log import collected_log, error_lines
from llama_worker._engine.threads import usable_cores
from llama_worker._errors import ModelLoadError


class AbortSwitch:
    """Implements `base.AbortFlag`: llama.cpp looks at it after every node of the compute graph.

    The callback is libc's strlen over two bytes: no GIL, no Python, and any thread can set the first
    byte. Where there is no such strlen, `installed` is False and cancelling works between steps only.
    """

    def __init__(self) -> None:
        self._byte = ctypes.create_string_buffer(2)
        self._callback = native_strlen()
        self.installed = self._callback is not None

    def raise_(self) -> None:
        self._byte[0] = b"\x01"

    def clear(self) -> None:
        self._byte[0] = b"\x00"

    def install(self, api: Any, params: Any) -> None:
        """Make contexts that are created with `params` look at this switch."""
        if self._callback is not None:
            params.abort_callback = ctypes.cast(self._callback, api.ggml_abort_callback)
            params.abort_callback_data = ctypes.addressof(self._byte)


def new_context(lib: Library, stack: ExitStack, model: Pointer, params: Any, abort: AbortSwitch) -> Pointer:
    """A context that `stack` frees. Raises ModelLoadError with llama.cpp's reason."""
    abort.install(lib.api, params)
    with collected_log() as lines:
        context = lib.api.llama_init_from_model(model, params)
    if not context:
        raise ModelLoadError(
            f"no context of n_ctx={params.n_ctx}, n_batch={params.n_batch} could be made: {error_lines(lines)}"
        )
    stack.callback(lib.api.llama_free, context)
    return context


def threads(config: ModelConfig) -> tuple[int, int]:
    """Threads for single tokens and for batches."""
    one = config.n_threads or usable_cores()
    return one, config.n_threads_batch or one
