"""Keywords that nobody knows: which one was meant. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Container, Mapping
from typing import Final

_MOST_NAMED: Final = 12
"""Fields that are all named when none is like the unknown one; of more, only whose they are."""

_ELSEWHERE: Final[Mapping[str, tuple[str, ...]]] = {
    "context_window": ("n_ctx",),
    "num_ctx": ("n_ctx",),
    "max_new_tokens": ("max_tokens",),
    "max_completion_tokens": ("max_tokens",),
    "num_predict": ("max_tokens",),
    "n_predict": ("max_tokens",),
    "model_path": ("model",),
    "model_name": ("model",),
    "num_gpu": ("n_gpu_layers",),
    "num_thread": ("n_threads",),
    "repetition_penalty": ("repeat_penalty",),
    "last_n_tokens_size": ("repeat_last_n",),
    "request_timeout": ("timeout",),
    "stop_sequences": ("stop",),
    "thread_id": ("session", "session_id"),
    "top_logprobs": ("logprobs",),
    "lora_path": ("lora_paths",),
}
"""What other libraries call it -> its names here."""

_OF_MODEL: Final = "belongs to the model, not to a call; give it to ModelConfig, or to the constructor"


def unknown_keyword(name: str, known: Collection[str], *, described: str, of_model: Container[str] = ()) -> str:
    """Why `name`, which is not in `known`, cannot be, and what to write instead.

    `described` says whose names `known` are. `of_model`: names that are right, but elsewhere.
    """
    if name in of_model:
        return _OF_MODEL
    renamed = _ELSEWHERE.get(name, ())
    here = next((ours for ours in renamed if ours in known), None)
    if here is not None:
        return f"unknown; here it is {here}"
    there = next((ours for ours in renamed if ours in of_model), None)
    if there is not None:
        return f"unknown; here it is {there}, which {_OF_MODEL}"
    near = difflib.get_close_matches(name, known, n=1)
    parts = [f"did you mean {near[0]}?"] if near else []
    if len(known) <= _MOST_NAMED:
        parts.append(f"the fields are {', '.join(known)}")
    elif not near:
        parts.append(described)
    return f"unknown; {' '.join(parts)}"
