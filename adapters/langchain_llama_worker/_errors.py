"""Errors of the worker as LangChain knows them: each is an instance of both families.

LangChain's own middleware acts on its classes (ContextOverflowError makes summarization cut the prompt,
`is_retryable` drives retries), while code that knows llama_worker catches llama_worker's. So what leaves
this adapter is both, and `except` works with either. An error without a counterpart passes unchanged. A reply that
is not what it had to be is an OutputParserException whoever finds it, the worker or a parser behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import langchain_core.exceptions as theirs

import llama_worker as ours

# The most specific first. Older cores have only some of these classes.
_COUNTERPARTS: tuple[tuple[type[ours.LlamaWorkerError], *tuple[str, ...]], ...] = (
    (ours.ContextOverflowError, "ContextOverflowError"),
    (ours.InvalidRequestError, "ModelInvalidRequestError"),
    (ours.TemplateError, "ModelInvalidRequestError"),
    (ours.UnsupportedFeatureError, "ModelInvalidRequestError"),
    (ours.RequestError, "ModelInvalidRequestError"),
    (ours.ModelNotFoundError, "ModelNotFoundError"),
    (ours.InsufficientMemoryError, "ModelError"),
    (ours.ModelLoadError, "ModelError"),
    (ours.QueueFull, "ModelRateLimitError"),
    (ours.DeadlineExceeded, "ModelTimeoutError"),
    (ours.InvalidOutputError, "ModelAPIError", "OutputParserException"),
    (ours.GenerationError, "ModelAPIError"),
    (ours.WorkerDied, "ModelConnectionError"),
    (ours.WorkerClosed, "ModelConnectionError"),
)


def _both(cls: type[ours.LlamaWorkerError], *names: str) -> type[ours.LlamaWorkerError]:
    known = tuple(getattr(theirs, name) for name in names if hasattr(theirs, name))
    body: dict[str, Any] = {"__module__": __name__, "__doc__": cls.__doc__, "__qualname__": cls.__name__}
    if theirs.OutputParserException in known:  # agents look for these
        body |= {"observation": None, "llm_output": None, "send_to_llm": False}
    return type(cls.__name__, (cls, *(known or (theirs.LangChainException,))), body)


_BOTH = {cls: _both(cls, *names) for cls, *names in _COUNTERPARTS}
# Pickle finds an error's class by its name in this module.
for _cls in _BOTH.values():
    setattr(sys.modules[__name__], _cls.__name__, _cls)


def as_langchain(error: ours.LlamaWorkerError) -> ours.LlamaWorkerError:
    """`error` as an instance of LangChain's class too, with all its attributes; or as it is."""
    cls = next((_BOTH[base] for base in type(error).__mro__ if base in _BOTH), None)
    if cls is None or isinstance(error, theirs.LangChainException):
        return error
    twin: Any = cls.__new__(cls, *error.args)
    twin.args = error.args
    twin.__dict__.update(error.__dict__)
    twin.__cause__ = error.__cause__
    return twin  # type: ignore[no-any-return]


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Let errors of the worker leave the block as `as_langchain` makes them."""
    try:
        yield
    except ours.LlamaWorkerError as error:
        twin = as_langchain(error)
        if twin is error:
            raise
        raise twin.with_traceback(error.__traceback__) from (error.__cause__ or error)
