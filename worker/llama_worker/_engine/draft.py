"""Opening a draft model beside the model that it guesses for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llama_worker._config import ModelConfig
from llama_worker._engine.base import ModelInfo
from llama_worker._errors import ConfigError
from llama_worker._models import draft_path, read_info

MOST_MISSING: Final = 128
"""Tokens by which vocabularies may differ in size: models of one family pad theirs otherwise. As llama.cpp has it."""


def require_draft(config: ModelConfig, info: ModelInfo) -> tuple[Path, ModelInfo] | None:
    """The draft model of `config`, for the model of `info`; None where none is wanted. Reads headers.

    Raises ConfigError for one that cannot guess for this model, and ModelLoadError.
    """
    if config.draft_model is None:
        return None
    if config.speculation == "off":
        raise _refused(config, "speculation is 'off', so nothing is guessed; use 'auto' or 'on', or leave it out")
    path = draft_path(config.draft_model)
    draft = read_info(path)
    for each in (info, draft):
        if each.is_embedding:
            raise _refused(config, f"{each.name} only embeds")
        if each.is_recurrent or each.is_hybrid:
            raise _refused(config, f"{each.name} cannot take tokens back, which wrong guesses need")
    if info.n_swa and not config.swa_full:
        raise _refused(config, f"with swa_full=False {info.name} cannot take tokens back, which wrong guesses need")
    if abs(draft.n_vocab - info.n_vocab) > MOST_MISSING:
        raise _refused(config, f"it has {draft.n_vocab} tokens, {info.name} {info.n_vocab}; use one of the same family")
    return path, draft


def require_same_tokens(config: ModelConfig, ours: Sequence[bytes], theirs: Sequence[bytes]) -> None:
    """Raises ConfigError where a token of the draft model is another text than the model's."""
    for token, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            text = f"its token {token} is {other!r} and the model's {one!r}; use one of the same family"
            raise _refused(config, text)


def _refused(config: ModelConfig, reason: str) -> ConfigError:
    return ConfigError("draft_model", config.draft_model, reason)
