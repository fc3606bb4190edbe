"""What a stream says: deltas, then exactly one terminal event, always last.

The rule holds for every accepted request, also when the worker reloads, closes or dies.
Terminal events carry the usage and the whole text so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llama_worker._requests import ToolCall

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "cancelled"]
"""stop: the model ended its turn or a stop string was met; length: max_tokens or n_ctx was reached;
tool_calls: it ended its turn and called tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Exact token counts of one request.

    `cached_tokens` of the `prompt_tokens` had their KV reused; at most prompt_tokens - 1, because
    the last one is always decoded for its logits. `completion_tokens` counts the reply's tokens, also those that
    a constraint left no choice about, without the end-of-generation token; `reasoning_tokens` of them were thought.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

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


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of what the model thinks before it answers: never empty, not part of the text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidToolCall:
    """A call that was begun and is none: cut off, or not as its tool wants it. `arguments` is what there is of them."""

    id: str
    name: str
    arguments: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallStarted:
    """The model calls the tool `name`. `index` counts the calls of the reply from 0; `id` is unique in it."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """The next piece of the arguments of call `index`: joined they are the text of one JSON object. Never empty."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallEnded:
    """Call `index` is complete and valid, or turned out not to be a call."""

    index: int
    call: ToolCall | InvalidToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The request ended in order, or was cancelled. `text` and `reasoning` are the joins of their deltas.

    `tool_calls` and `invalid_tool_calls` are those of the ToolCallEnded events. `model` is the name of the model
    that answered.
    """

    reason: FinishReason
    text: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    model: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request failed by `error`; `text`, `reasoning` and `usage` say how far it had come."""

    error: Exception
    text: str
    usage: Usage
    reasoning: str = ""


Terminal: TypeAlias = Finished | Failed
ReplyEvent: TypeAlias = TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta | ToolCallEnded
"""What a reply is made of, as it comes."""
StreamEvent: TypeAlias = ReplyEvent | Finished | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer: the stream, folded. `model` is the name of the model that gave it.

    `text` is what the model says, `reasoning` what it thought before; `tool_calls` are complete and valid.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    model: str
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


def reply_of(end: Finished) -> Reply:
    """What a stream that ended so says as a whole."""
    return Reply(
        text=end.text,
        finish_reason=end.reason,
        usage=end.usage,
        model=end.model,
        logprobs=end.logprobs,
        reasoning=end.reasoning,
        tool_calls=end.tool_calls,
        invalid_tool_calls=end.invalid_tool_calls,
    )


def assert_well_formed(events: Iterable[StreamEvent]) -> Terminal:
    """Check the stream rule on a whole stream and return its terminal event. Raises AssertionError."""
    seen = list(events)
    assert seen, "a stream must end with a terminal event, this one is empty"
    terminal, deltas = seen[-1], seen[:-1]
    assert isinstance(terminal, Finished | Failed), f"the last event is {type(terminal).__name__}"
    pieces: dict[type[object], list[str]] = {TextDelta: [], ReasoningDelta: []}
    for event in deltas:
        assert not isinstance(event, Finished | Failed), "a terminal event must be the last one"
        if isinstance(event, TextDelta | ReasoningDelta):
            assert event.text, "a delta must not be empty"
            pieces[type(event)].append(event.text)
    for kind, whole in ((TextDelta, terminal.text), (ReasoningDelta, terminal.reasoning)):
        n = sum(map(len, pieces[kind]))
        assert "".join(pieces[kind]) == whole, f"{kind.__name__}s of {n} characters, terminal of {len(whole)}"
    _assert_calls_well_formed(deltas, terminal)
    return terminal


def _assert_calls_well_formed(deltas: list[StreamEvent], terminal: Terminal) -> None:
    """Each call is started, told and ended, one after another, and the end of the stream names them all."""
    ended: list[ToolCall | InvalidToolCall] = []
    open_call: ToolCallStarted | None = None
    for event in deltas:
        match event:
            case ToolCallStarted(index=index):
                assert open_call is None, f"call {index} starts inside another"
                assert index == len(ended), f"call {index} comes after {len(ended)} others"
                open_call = event
            case ToolCallDelta(index=index, arguments=arguments):
                assert open_call is not None, f"arguments of call {index}, which is not open"
                assert index == open_call.index, f"arguments of call {index} inside {open_call.index}"
                assert arguments, "a delta must not be empty"
            case ToolCallEnded(index=index, call=call):
                assert open_call is not None, f"call {index} ends, which is not open"
                assert (index, call.id, call.name) == (open_call.index, open_call.id, open_call.name)
                ended.append(call)
                open_call = None
            case _:
                pass
    ids = [call.id for call in ended]
    assert len(set(ids)) == len(ids), "ids of calls must be unique"
    if isinstance(terminal, Finished):
        assert open_call is None, "a call is never ended"
        assert terminal.tool_calls == tuple(call for call in ended if isinstance(call, ToolCall))
        assert terminal.invalid_tool_calls == tuple(call for call in ended if isinstance(call, InvalidToolCall))
