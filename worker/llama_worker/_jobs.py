"""Jobs: requests that were prepared for one loaded model, as tokens that fit."""

from __future__ import annotations

from dataclasses import dataclass

from llama_worker._requests import EmbedRequest, GenerationRequest
from llama_worker._tokens import TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """A generation, prepared for the model of `epoch`, named `model`: its prompt, and how many tokens may follow.

    `prefix_digest` identifies the prompt's tokens for the splice of known replies; None for raw prompts.
    """

    request: GenerationRequest
    epoch: int
    model: str
    prompt: TokenIds
    max_tokens: int
    prefix_digest: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedJob:
    """Texts to embed, prepared for the model of `epoch`."""

    request: EmbedRequest
    epoch: int
    texts: tuple[TokenIds, ...]
