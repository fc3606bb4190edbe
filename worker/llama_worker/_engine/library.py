"""The native library: loaded on first use, checked against what this package was verified with.

llama.cpp aborts the process on misuse and changes its structs between releases, so nothing here trusts
that the installed binding is the one we know: version, struct fields and the defaults that llama.cpp
itself returns are compared before the first model is opened.

Two handles lead to the same library. Calls of microseconds go through a PyDLL handle, which keeps the
GIL: releasing it would let a busy Python thread take it for a whole switch interval (5 ms) each time.
Everything that computes, loads, copies state or waits goes through the binding's CDLL handle.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import os
import re
import threading
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from llama_worker._engine.log import forward_log
from llama_worker._errors import EngineVersionError

Pointer: TypeAlias = Any
"""A llama.cpp object, as ctypes hands it out: an address or a pointer object; falsy when null."""

_MIN_VERSION: Final = (0, 3, 36)
_END_VERSION: Final = (0, 4)

# What llama.cpp returned as defaults in the version we verified. A shifted struct shows as a wrong value.
_MODEL_DEFAULTS: Final[Mapping[str, object]] = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
_CONTEXT_DEFAULTS: Final[Mapping[str, object]] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_orig_ctx": 0,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}
_BATCH_FIELDS: Final = ("n_tokens", "token", "embd", "pos", "n_seq_id", "seq_id", "logits")
_SHORT_CALLS: Final = (
    "llama_get_logits",
    "llama_memory_clear",
    "llama_memory_seq_cp",
    "llama_memory_seq_pos_max",
    "llama_memory_seq_pos_min",
    "llama_memory_seq_rm",
    "llama_sampler_accept",
    "llama_sampler_apply",
    "llama_sampler_sample",
    "llama_tokenize",
    "llama_token_to_piece",
    "llama_vocab_get_attr",
    "llama_vocab_get_text",
    "llama_vocab_is_eog",
)


class Library:
    """The functions of llama.cpp. `api` releases the GIL while it runs, `short` does not."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.short = _ShortCalls(api)
        self._pause = _pause_of_libgomp(api)

    @functools.cached_property
    def build(self) -> tuple[str, str]:
        """The version, and what it was compiled for: CPU features and back-ends. Other builds round differently."""
        return _installed_version(), self.api.llama_print_system_info().decode("utf-8", "replace")

    @functools.cached_property
    def offloads(self) -> bool:
        """Whether there is anything that layers could be offloaded to."""
        return bool(self.api.llama_supports_gpu_offload())

    def let_team_go(self) -> None:
        """End the OpenMP threads that wait beside the calling one; they come back when they are needed (10 us).

        libgomp lets waiting threads spin 300,000 times, but 100 times once all threads that it has ever made in
        this process and not ended are more than the CPUs (gomp_managed_threads in its wait.h). Then each of the
        hundreds of barriers of a decode sleeps in the kernel: 133 tokens/s become 92 on 2 cores, because of an
        idle thread that once computed. So whoever stops computing lets its team go.
        """
        if self._pause is not None:
            self._pause(_OMP_PAUSE_SOFT)


class _ShortCalls:
    """The same functions on a handle that keeps the GIL; pointers come back as plain addresses."""

    def __init__(self, api: Any) -> None:
        handle = ctypes.PyDLL(api._lib._name, handle=api._lib._handle)
        for name in _SHORT_CALLS:
            known, call = getattr(api, name), handle[name]
            call.argtypes, call.restype = known.argtypes, known.restype
            setattr(self, name, call)
        self.llama_get_logits.restype = ctypes.c_void_p

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not bound as a short call")


_OMP_PAUSE_SOFT: Final = 1


def _pause_of_libgomp(api: Any) -> Any | None:
    """omp_pause_resource_all of the libgomp that llama.cpp computes with; None where it does not."""
    try:
        pause = api._lib["omp_pause_resource_all"]
    except AttributeError:
        return None
    # LLVM's library has the name too, but pauses the teams of all threads.
    return None if _has(api._lib, "kmp_set_blocktime") else pause


def _has(handle: Any, name: str) -> bool:
    try:
        handle[name]
    except AttributeError:
        return False
    return True


_loading = threading.Lock()


def library() -> Library:
    """llama.cpp, ready to use. Loads it on the first call. Raises EngineVersionError. Any thread."""
    # Two workers may start at once. The cache alone would let both in, and the second would find the
    # binding's submodule loaded while the package still goes on to install a logger of its own.
    with _loading:
        return _load()


@functools.cache
def _load() -> Library:
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else a native abort forks a debugger first
    _check_version(_installed_version())
    try:
        api = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as exc:
        raise EngineVersionError(f"llama-cpp-python is installed but does not load: {exc}") from exc
    api.llama_log_set(forward_log, ctypes.c_void_p(0))
    atexit.register(_silence, api)
    _check_defaults("llama_model_params", api.llama_model_default_params(), _MODEL_DEFAULTS)
    _check_defaults("llama_context_params", api.llama_context_default_params(), _CONTEXT_DEFAULTS)
    _check_fields(api.llama_batch, _BATCH_FIELDS)
    api.llama_backend_init()
    return Library(api)


def _installed_version() -> str:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise EngineVersionError("llama-cpp-python is not installed; pip install llama-worker brings it") from None


def _check_version(text: str) -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    if not _MIN_VERSION <= version < _END_VERSION:
        raise EngineVersionError(f"llama-cpp-python {text} is not supported; install >=0.3.36,<0.4")


def _check_defaults(struct: str, values: Any, expected: Mapping[str, object]) -> None:
    missing = object()
    differing = [
        f"{field} is {'missing' if actual is missing else repr(actual)} (expected {value!r})"
        for field, value in expected.items()
        if (actual := getattr(values, field, missing)) != value
    ]
    if differing:
        raise EngineVersionError(
            f"{struct} of the installed llama-cpp-python differs: {'; '.join(differing)}; install 0.3.36"
        )


def _check_fields(struct: Any, expected: tuple[str, ...]) -> None:
    actual = tuple(name for name, *_ in struct._fields_)
    if actual != expected:
        raise EngineVersionError(f"{struct.__name__} has the fields {actual}, expected {expected}; install 0.3.36")


def _silence(api: Any) -> None:
    # A line logged while the interpreter goes down would call into it. libc's abs takes the same
    # first argument, does nothing, and needs no Python.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        api.llama_log_set(ctypes.cast(ctypes.CDLL(None).abs, api.llama_log_callback), ctypes.c_void_p(0))


@functools.cache
def native_strlen() -> Any | None:
    """libc's strlen, or None where it cannot be had.

    As an abort callback over a two-byte buffer it needs no GIL: the first byte says whether to abort.
    """
    try:
        return ctypes.CDLL(None).strlen
    except (OSError, AttributeError, TypeError):
        return None
