"""ReplyPipeline: sampled tokens in, what may be shown out.

token -> Detokenizer (whole characters) -> Parser (text, thoughts, calls) -> StopMatcher (text only) -> events

A reply that can be nothing but text has no parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from llama_worker._events import (
    Finished,
    FinishReason,
    InvalidToolCall,
    ReasoningDelta,
    ReplyEvent,
    TextDelta,
    TokenLogprob,
    ToolCallEnded,
    Usage,
)
from llama_worker._requests import ToolCall
from llama_worker._text.detokenizer import Detokenizer
from llama_worker._text.stops import StopMatcher

CallCheck = Callable[[ToolCall], ToolCall | InvalidToolCall]
"""Holds a complete call against what its grammar could not enforce."""


class Parser(Protocol):
    """Tells text, thoughts and calls apart: see `_chat.parser.OutputParser`."""

    def feed(self, text: str) -> Sequence[ReplyEvent]: ...

    def flush(self) -> Sequence[ReplyEvent]: ...

    @property
    def in_reasoning(self) -> bool: ...


class ReplyPipeline:
    """The text side of one generation. Not thread-safe; the worker's."""

    __slots__ = (
        "_blanks",
        "_check",
        "_detokenizer",
        "_flushed",
        "_logprobs",
        "_parser",
        "_shown",
        "_stops",
        "_text",
        "_thoughts",
        "invalid_tool_calls",
        "n_reasoning",
        "tool_calls",
    )

    def __init__(
        self,
        pieces: Sequence[bytes],
        stops: tuple[str, ...],
        parser: Parser | None = None,
        check: CallCheck | None = None,
    ) -> None:
        self._detokenizer = Detokenizer(pieces)
        self._stops = StopMatcher(stops)
        self._parser = parser
        self._check = check
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._shown = 0
        self._blanks = ""
        self._flushed = False
        self.n_reasoning = 0
        self.tool_calls: list[ToolCall] = []
        self.invalid_tool_calls: list[InvalidToolCall] = []

    @property
    def stopped(self) -> bool:
        """A stop string was met; nothing more will be shown."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """All thoughts shown so far."""
        return "".join(self._thoughts)

    @property
    def is_text_alone(self) -> bool:
        """Whether there is nothing in it but its text."""
        return self._parser is None or (self.stopped and not self._thoughts and not self.tool_calls)

    @property
    def in_reasoning(self) -> bool:
        return self._parser is not None and self._parser.in_reasoning

    @property
    def is_whole(self) -> bool:
        """Whether no character is half said."""
        return self._detokenizer.is_whole

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> Sequence[ReplyEvent]:
        """Take one token; return what it allows to be shown, if anything."""
        if logprob is not None:
            self._logprobs.append(logprob)
        text = self._detokenizer.feed(token)
        if self._parser is None:
            return self._show(self._stops.feed(text)) if text else ()
        was_reasoning = self._parser.in_reasoning
        events = self._parsed(self._parser.feed(text)) if text else ()
        self.n_reasoning += was_reasoning or self._parser.in_reasoning
        return events

    def flush(self) -> Sequence[ReplyEvent]:
        """The generation is over: show what was held back, unless a stop string ended it. Again: nothing."""
        if self._stops.stopped or self._flushed:
            return ()
        self._flushed = True
        tail = self._detokenizer.flush()
        if self._parser is None:
            return self._show((self._stops.feed(tail) if tail else "") + self._held())
        events = self._parsed(self._parser.feed(tail)) if tail else []
        events += self._parsed(self._parser.flush())
        return [*events, *self._show(self._stops.feed(self._blanks)), *self._show(self._held())]

    def finished(self, reason: FinishReason, usage: Usage, model: str = "") -> Finished:
        return Finished(
            reason="tool_calls" if reason == "stop" and self.tool_calls else reason,
            text=self.text,
            usage=usage,
            logprobs=tuple(self._logprobs),
            model=model,
            reasoning=self.reasoning,
            tool_calls=tuple(self.tool_calls),
            invalid_tool_calls=tuple(self.invalid_tool_calls),
        )

    def _held(self) -> str:
        return "" if self._stops.stopped else self._stops.flush()

    def _parsed(self, events: Iterable[ReplyEvent]) -> list[ReplyEvent]:
        """`events` as they may be shown: text up to a stop string, and behind one nothing.

        Blanks between text and a call belong to neither: the template writes its own.
        """
        shown: list[ReplyEvent] = []
        for event in events:
            if isinstance(event, TextDelta):
                text = self._blanks + event.text
                body = text.rstrip()
                self._blanks = text[len(body) :]
                shown += self._show(self._stops.feed(body))
            else:
                self._blanks = ""
                # No stop string reaches across a thought or a call.
                shown += self._show(self._held())
                if not self._stops.stopped:
                    shown.append(self._noted(event))
                    self._shown = len(self._logprobs)
            if self._stops.stopped:
                break
        return shown

    def _noted(self, event: ReplyEvent) -> ReplyEvent:
        if isinstance(event, ReasoningDelta):
            self._thoughts.append(event.text)
        elif isinstance(event, ToolCallEnded):
            call = event.call
            if isinstance(call, ToolCall) and self._check is not None:
                call = self._check(call)
                event = ToolCallEnded(index=event.index, call=call)
            if isinstance(call, ToolCall):
                self.tool_calls.append(call)
            else:
                self.invalid_tool_calls.append(call)
        return event

    def _show(self, text: str) -> Sequence[TextDelta]:
        if not text:
            return ()
        self._text.append(text)
        if not self._logprobs:
            return (TextDelta(text),)
        fresh = tuple(self._logprobs[self._shown :])
        self._shown = len(self._logprobs)
        return (TextDelta(text, fresh),)
