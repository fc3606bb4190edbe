"""What a session says of itself: what a call reused and computed, and what it holds. Counts, never text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llama_worker._manifest import Manifest, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStatus:
    """What `ensure_prefix` did, in tokens.

    `reused` were computed already, by whomever, `prefilled` are computed now; together they are the prefix, which is
    `resident`. `dropped` the session held before, and they are no part of it any more. `available` are left of what
    one request may use. `digest` is that of the prefix's token ids: the same prefix has the same.
    """

    reused: int
    prefilled: int
    dropped: int
    resident: int
    available: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixStatus:
    """What `prefill_suffix` or `prefill` did, in tokens: as PrefixStatus, of prefix and suffix together.

    The last token of a prompt is computed by what decodes, for its logits: it is not `resident` yet.
    """

    reused: int
    prefilled: int
    dropped: int
    resident: int
    available: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextReport:
    """What a session holds, and what came of it so far.

    `tokens` are known, `resident` of them were computed (what was evicted since is restored or computed by who needs
    it), `prefix` of them are stable; `reused` and `prefilled` are sums over all its calls. There are no `segments` and
    no `manifest` before the first call.
    """

    session: str
    state: Literal["open", "closed", "broken"]
    n_ctx: int
    tokens: int
    resident: int
    prefix: int
    reused: int
    prefilled: int
    manifest: Manifest | None

    @property
    def available(self) -> int:
        return max(0, self.n_ctx - self.tokens)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return () if self.manifest is None else self.manifest.segments

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        whole = f"{self.tokens} of {self.n_ctx} tokens, {self.prefix} in the prefix"
        yield f"session {self.session} ({self.state}): {whole}"
        for segment in self.segments:
            kept = "stable" if segment.stable else ""
            yield f"{segment.start:>8} {segment.n_tokens:>7}  {segment.role:<10}{kept}".rstrip()
        yield f"{self.reused} tokens were reused, {self.prefilled} computed"
