"""What a stream says: deltas, then exactly one terminal event, always last.

The rule holds for every accepted request, also when the worker reloads, closes or dies.
Terminal events carry the usage and the whole text so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
"""stop: the model ended its turn or a stop string was met; length: max_tokens or n_ctx was reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Exact token counts of one request.

    `cached_tokens` of the `prompt_tokens` had their KV reused; at most prompt_tokens - 1, because
    the last one is always decoded for its logits. `completion_tokens` counts sampled tokens,
    without the end-of-generation token.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One sampled token: its id, its text, its natural-log probability and the likeliest alternatives.

    Probabilities are those of the model's own softmax, before any sampler. `top` is sorted, likeliest
    first, and has as many entries as `SamplingParams.logprobs` asked for.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of text: never empty, never half a character, never part of a stop string."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The request ended in order, or was cancelled. `text` is the join of all deltas.

    `model` is the name of the model that answered.
    """

    reason: FinishReason
    text: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request failed by `error`; `text` and `usage` say how far it had come."""

    error: Exception
    text: str
    usage: Usage


Terminal: TypeAlias = Finished | Failed
StreamEvent: TypeAlias = TextDelta | Finished | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer: the stream, folded. `model` is the name of the model that gave it."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    model: str
    logprobs: tuple[TokenLogprob, ...] = ()


def assert_well_formed(events: Iterable[StreamEvent]) -> Terminal:
    """Check the stream rule on a whole stream and return its terminal event. Raises AssertionError."""
    seen = list(events)
    assert seen, "a stream must end with a terminal event, this one is empty"
    terminal = seen[-1]
    assert isinstance(terminal, Finished | Failed), f"the last event is {type(terminal).__name__}"
    deltas = seen[:-1]
    assert all(isinstance(e, TextDelta) and e.text for e in deltas), "only non-empty deltas may come first"
    joined = "".join(e.text for e in deltas if isinstance(e, TextDelta))
    assert joined == terminal.text, f"deltas of {len(joined)} characters, terminal of {len(terminal.text)}"
    return terminal
