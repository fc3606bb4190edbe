"""Manifest: what a session's tokens are, and under what they may be used again.

Two gates, as everywhere where KV is reused: first the runtime (other weights, or another template, make other
tokens and other KV of the same words), then the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

import numpy as np

from llama_worker._tokens import TokenIds
from llama_worker._view import ModelView

End: TypeAlias = tuple[str, int]
"""The role of a message, and the place where its tokens end."""

RAW = "tokens"
"""The role of what was given as ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeIdentity:
    """What a session was computed with. `model` and `template` are digests, `loras` are (digest, scale), sorted.

    `n_ctx` is told, and no part of the gate: with more or less room the same tokens are the same.
    """

    model: str
    template: str
    type_k: str
    type_v: str
    n_ctx: int
    loras: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, view: ModelView, loras: tuple[tuple[str, float], ...] = ()) -> RuntimeIdentity:
        config = view.config
        return cls(
            model=view.info.digest,
            template=view.template.digest,
            type_k=config.type_k,
            type_v=config.type_v,
            n_ctx=view.n_ctx,
            loras=loras,
        )

    def difference(self, other: RuntimeIdentity) -> str | None:
        """Why what was computed with this one is of no use with `other`; None where it is."""
        if self.model != other.model:
            return "another model is loaded"
        if self.template != other.template:
            return "the chat template is another"
        if (self.type_k, self.type_v) != (other.type_k, other.type_v):
            return f"K and V are kept as {other.type_k} and {other.type_v}, not {self.type_k} and {self.type_v}"
        return None if self.loras == other.loras else "the LoRA adapters are others"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The tokens `start` to `end` of a session: one message of `role`. `stable`: part of the prefix.

    What the template writes between two messages counts for the second, what it writes behind the last for that; a
    message that stands in the prompt otherwise than it was given counts for the next. `digest` is of the token ids.
    """

    role: str
    stable: bool
    start: int
    end: int
    digest: str

    @property
    def n_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a session holds: its runtime, its segments in order, and how many tokens they and the prefix are.

    `prefix_digest` is of the prefix's token ids alone, `digest` of everything. Never text.
    """

    identity: RuntimeIdentity
    segments: tuple[Segment, ...]
    n_prefix: int
    n_tokens: int
    prefix_digest: str

    @classmethod
    def of(
        cls, identity: RuntimeIdentity, tokens: TokenIds, n_prefix: int, ends: Sequence[tuple[str, int]]
    ) -> Manifest:
        """Of a session that holds `tokens`, with `ends` of its messages in order."""
        return cls(
            identity=identity,
            segments=tuple(_segments(tokens, n_prefix, ends)),
            n_prefix=n_prefix,
            n_tokens=len(tokens),
            prefix_digest=token_digest(tokens[:n_prefix]),
        )

    def going_on(self, tokens: TokenIds) -> Manifest:
        """The same with what `tokens` hold more than it, in a segment that is no message."""
        ends = [(segment.role, segment.end) for segment in self.segments if segment.role != RAW]
        return Manifest.of(self.identity, tokens, self.n_prefix, [*ends, (RAW, len(tokens))])

    @property
    def digest(self) -> str:
        parts = [repr(self.identity), str(self.n_prefix), *(segment.digest for segment in self.segments)]
        return _digest("\n".join(parts).encode())


def token_digest(tokens: TokenIds) -> str:
    """The digest of ids, as little-endian 32-bit integers."""
    return _digest(np.ascontiguousarray(tokens, "<i4").tobytes())


def _segments(tokens: TokenIds, n_prefix: int, ends: Sequence[End]) -> Iterator[Segment]:
    start = 0
    for role, end in ends:
        if end > start:
            yield Segment(
                role=role, stable=end <= n_prefix, start=start, end=end, digest=token_digest(tokens[start:end])
            )
            start = end


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
