"""ReplyPipeline: sampled tokens in, text that may be shown out.

token -> Detokenizer (whole characters) -> StopMatcher (no part of a stop string) -> delta
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_worker._events import Finished, FinishReason, TextDelta, TokenLogprob, Usage
from llama_worker._text.detokenizer import Detokenizer
from llama_worker._text.stops import StopMatcher


class ReplyPipeline:
    """The text side of one generation. Not thread-safe; the worker's."""

    __slots__ = ("_detokenizer", "_logprobs", "_parts", "_shown", "_stops")

    def __init__(self, pieces: Sequence[bytes], stops: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(pieces)
        self._stops = StopMatcher(stops)
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._shown = 0

    @property
    def stopped(self) -> bool:
        """A stop string was met; nothing more will be shown."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._parts)

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> TextDelta | None:
        """Take one token; return what it allows to be shown, if anything."""
        if logprob is not None:
            self._logprobs.append(logprob)
        text = self._detokenizer.feed(token)
        return self._show(self._stops.feed(text)) if text else None

    def flush(self) -> TextDelta | None:
        """The generation is over: show what was held back, unless a stop string ended it."""
        if self._stops.stopped:
            return None
        tail = self._detokenizer.flush()
        shown = self._stops.feed(tail) if tail else ""
        return self._show(shown if self._stops.stopped else shown + self._stops.flush())

    def finished(self, reason: FinishReason, usage: Usage, model: str = "") -> Finished:
        return Finished(reason=reason, text=self.text, usage=usage, logprobs=tuple(self._logprobs), model=model)

    def _show(self, text: str) -> TextDelta | None:
        if not text:
            return None
        self._parts.append(text)
        if not self._logprobs:
            return TextDelta(text)
        fresh = tuple(self._logprobs[self._shown :])
        self._shown = len(self._logprobs)
        return TextDelta(text, fresh)
