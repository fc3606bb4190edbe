"""The devices that layers can be offloaded to, and what is free on each."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any, Final

from llama_worker._engine.library import library

# An integrated GPU (2) computes in the machine's own memory, so there is nothing to count apart.
_GPU: Final = 1
_SIGNATURES: Final[Mapping[str, tuple[Any, tuple[Any, ...]]]] = {
    "ggml_backend_dev_count": (ctypes.c_size_t, ()),
    "ggml_backend_dev_get": (ctypes.c_void_p, (ctypes.c_size_t,)),
    "ggml_backend_dev_type": (ctypes.c_int, (ctypes.c_void_p,)),
    "ggml_backend_dev_memory": (
        None,
        (ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)),
    ),
}


def free_device_bytes() -> tuple[int, ...]:
    """Free bytes of each GPU with memory of its own, in llama.cpp's order; empty where there is none.

    Any thread. Milliseconds; the first call may take a second while a driver starts. Raises EngineVersionError.
    """
    if not library().api.llama_supports_gpu_offload():
        return ()
    ggml = _functions()
    devices = (ggml["dev_get"](index) for index in range(ggml["dev_count"]()))
    memories = (_memory(ggml, device) for device in devices if ggml["dev_type"](device) == _GPU)
    return tuple(free for free, total in memories if total)  # a device that tells nothing limits nothing


@functools.cache
def _functions() -> Mapping[str, Any]:
    handle, functions = library().api._lib, {}
    for name, (result, arguments) in _SIGNATURES.items():
        call = handle[name]  # a new object each time, so nobody else's signatures change
        call.restype, call.argtypes = result, arguments
        functions[name.removeprefix("ggml_backend_")] = call
    return functions


def _memory(ggml: Mapping[str, Any], device: int) -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml["dev_memory"](device, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value
