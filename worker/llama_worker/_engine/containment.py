"""Containment: what llama.cpp would end the process for stops one thread instead.

    GGML_ASSERT, ggml_abort     ggml calls a callback before it calls abort(); the callback does not return
    an uncaught C++ exception   std::terminate calls a handler that must not return, and does not

Both are Python functions, because a crash may come inside a call that keeps the GIL: waiting in C would keep
it for ever, waiting in Python gives it up. Memory errors (SIGSEGV) and libc's own abort() are not
contained: after those nothing in the process can be trusted.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from typing import Any, Final

from llama_worker import _exit, _parking
from llama_worker._config import ModelConfig
from llama_worker._engine.base import LoadedModel, Loader
from llama_worker._engine.library import library
from llama_worker._errors import ConfigError

_SET_TERMINATE: Final = "_ZSt13set_terminatePFvvE"  # std::set_terminate, as the Itanium C++ ABI spells it

_AbortCallback: Final = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_TerminateHandler: Final = ctypes.CFUNCTYPE(None)


def contained(loader: Loader) -> Loader:
    """`loader`, which first makes the process contain crashes; it raises ConfigError where that is impossible."""

    @functools.wraps(loader)
    def load(config: ModelConfig) -> LoadedModel:
        install()
        return loader(config)

    return load


_installing = threading.Lock()


def install() -> None:
    """Have native crashes on guarded threads park them, until the interpreter ends. Idempotent; any thread.

    Loads llama.cpp. Raises ConfigError on a platform without these hooks.
    """
    with _installing:  # a second installation would take its own handler for the former one
        _install()


@functools.cache
def _install() -> None:
    handle = library().api._lib  # through this handle there is one ggml; its file opened by path is another
    try:
        set_abort, set_terminate = handle["ggml_set_abort_callback"], handle[_SET_TERMINATE]
    except AttributeError as exc:
        raise ConfigError("contain_crashes", True, f"this platform does not offer it: {exc}") from exc
    for setter in (set_abort, set_terminate):
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
    former = set_terminate(ctypes.cast(_on_terminate, ctypes.c_void_p))
    _former_handler.append(_TerminateHandler(former))
    set_abort(ctypes.cast(_on_abort, ctypes.c_void_p))
    _exit.after_leaving(functools.partial(_withdraw, set_abort, set_terminate, former))


_former_handler: Final[list[Any]] = []


def _withdraw(set_abort: Any, set_terminate: Any, former: int) -> None:
    # While the interpreter ends no Python can run on another thread.
    set_abort(None)
    set_terminate(former)


def _aborting(message: bytes | None) -> None:
    said = message or b"ggml_abort"
    _parking.park_if_guarded(_without_build_path(said.decode("utf-8", "replace")), strays=True)
    os.write(2, said + b"\n")  # as ggml does without a callback; it aborts next


def _without_build_path(said: str) -> str:
    return re.sub(r"^\S*/llama\.cpp/", "", said)


def _terminating() -> None:
    _parking.park_if_guarded("an uncaught C++ exception", strays=False)
    for handler in _former_handler:
        handler()


_on_abort: Final = _AbortCallback(_aborting)
_on_terminate: Final = _TerminateHandler(_terminating)
