"""grammar_of: a request and its model's format, made into the Grammar of the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from llama_worker._chat.format import ChatFormat, TextSyntax
from llama_worker._constraint.answer import Answer
from llama_worker._constraint.calls import Calls
from llama_worker._constraint.rules import (
    Check,
    Grammar,
    Maybe,
    Node,
    Opening,
    Pattern,
    Schema,
    Span,
    Text,
    either,
    row,
)
from llama_worker._constraint.union import begins_as_json, union_schema
from llama_worker._errors import UnsupportedFeatureError
from llama_worker._requests import GenerationRequest, ToolName, ToolSpec

_NEWLINES: Final = Pattern(r"\n{0,2}")
"""What models write between a thought and what follows; more would only be waste."""


def grammar_of(request: GenerationRequest, format: ChatFormat, *, in_reasoning: bool) -> Grammar | None:
    """What the reply to `request` may be; None where it may be anything.

    `in_reasoning`: the prompt ends inside a thought. Raises InvalidRequestError for schemas and names that cannot
    be enforced, UnsupportedFeatureError for tools where the format knows none.
    """
    tools = callable_tools(request)
    if not tools and request.response_format is None:
        return None
    return _Reply(request, format, in_reasoning, tools).grammar()


def callable_tools(request: GenerationRequest) -> Sequence[ToolSpec]:
    """The tools that the reply to `request` may call."""
    if isinstance(request.tool_choice, ToolName):
        return [tool for tool in request.tools if tool.name == request.tool_choice.name]
    return () if request.tool_choice == "none" else request.tools


class _Reply:
    """Puts the rules of one reply together."""

    def __init__(
        self, request: GenerationRequest, format: ChatFormat, in_reasoning: bool, tools: Sequence[ToolSpec]
    ) -> None:
        self._request = request
        self._format = format
        self._in_reasoning = in_reasoning
        # A raw prompt is continued; what a chat template would put around the reply is none of its business.
        self._in_chat = request.messages is not None
        self._reasoning = format.reasoning if self._in_chat else None
        self._calls = self._calls_of(tools) if tools else None
        self._answer = Answer(request.response_format) if request.response_format else None

    def grammar(self) -> Grammar:
        rules: list[tuple[str, Node]] = [("start", row(*self._thought(), self._body()))]
        schemas: list[tuple[str, Schema]] = []
        checks: list[Check] = []
        for part in (self._calls, self._answer):
            if part is not None:
                rules += part.rules
                schemas += part.schemas
                checks += part.checks
        field = self._answer.field if self._answer else "tools"
        return Grammar(field=field, rules=tuple(rules), schemas=tuple(schemas), checks=tuple(checks))

    def _calls_of(self, tools: Sequence[ToolSpec]) -> Calls:
        if self._format.calls is None:
            raise UnsupportedFeatureError(
                "tools", "this model's chat template knows none, and none could be told to it"
            )
        calls = Calls(self._format.calls, tools, self._request.parallel_tool_calls)
        calls.prepare()
        return calls

    def _thought(self) -> Sequence[Node]:
        """What the model may think before it answers."""
        syntax = self._reasoning
        if syntax is None:
            return ()
        close = Span(close=syntax.close.strip())
        if self._in_reasoning:
            return (close, _NEWLINES)
        if not self._may_think:
            return ()
        return (Maybe(row(self._marker(syntax.open.strip()), close, _NEWLINES)),)

    def _body(self) -> Node:
        calls = self._calls
        if calls is None:
            return self._text(self._answered())
        if self._request.tool_choice != "auto":
            return calls.whole()
        if not calls.syntax.trigger:
            return either(calls.whole(), self._text(self._spoken_before(calls), marked=True))
        begun = row(self._marker(calls.syntax.trigger), calls.behind_trigger())
        if self._answer is not None and self._answer.schemas and begins_as_json(calls.syntax):
            return self._json_union(calls, self._answer)
        if self._answer is not None:
            return either(begun, self._text(self._answered()))
        if calls.syntax.only_at_start:
            return either(begun, self._text(self._spoken()))
        return self._lazy(calls, begun)

    def _json_union(self, calls: Calls, answer: Answer) -> Node:
        tools = {check.tool: check.schema for check in calls.checks if check.tool is not None}
        calls.schemas = []
        calls.checks = [replace(check, parts=answer.parts) for check in calls.checks]
        answer.become(union_schema(calls.syntax, tools, answer.schema))
        return answer.node(())

    def _marker(self, text: str) -> Node:
        """The beginning of a thought or a call. Blanks may come before it where text could be what follows them:
        elsewhere they would force the marker, for nothing else begins with them."""
        is_free = self._calls is not None and self._request.tool_choice == "auto" and self._answer is None
        return Opening(text) if is_free else Text(text)

    def _lazy(self, calls: Calls, begun: Node) -> Node:
        """Free text, and calls wherever the trigger stands in it."""
        text = self._format.text
        opened = Maybe(Opening(text.open.lstrip())) if text.open else None
        unless = self._beginnings(calls=False)
        marks = tuple(filter(None, (calls.syntax.trigger, text.close.strip())))
        ways = [
            row(Span(close=calls.syntax.trigger, unless=unless, marks=marks), calls.behind_trigger()),
            Span(unless=unless, marks=marks),
        ]
        if text.close:
            closed = Span(close=text.close.strip(), unless=unless, marks=marks)
            ways += [row(closed, begun), closed]
        return row(opened, either(*ways))

    @property
    def _may_think(self) -> bool:
        """Whether the reply may begin with the tag of a thought."""
        return not self._in_reasoning and self._request.enable_thinking is not False

    def _beginnings(self, *, calls: bool = True, thoughts: bool = True) -> tuple[str, ...]:
        """What free text does not begin with, because it would be no text."""
        trigger = self._calls.syntax.trigger if calls and self._calls else ""
        thought = self._reasoning.open.strip() if thoughts and self._reasoning else ""
        text = self._format.text.open.lstrip() if self._in_chat else ""
        return tuple(filter(None, (thought, text, trigger)))

    def _text(self, answer: Node, *, marked: bool = False) -> Node:
        """An answer, with what the template may put around it. `marked`: what begins it must be there.

        Behind an answer that must have a form nothing is put: whoever reads it takes all of it for the answer.
        """
        syntax = self._format.text if self._in_chat else TextSyntax()
        opening = self._marker(syntax.open.lstrip())
        before = opening if marked else Maybe(opening) if syntax.open else None
        closes = syntax.close and self._answer is None
        return row(before, answer, Maybe(Text(syntax.close.strip())) if closes else None)

    def _spoken(self) -> Node:
        """Any text, or the one that is wanted."""
        return Span(unless=self._beginnings()) if self._answer is None else self._answered()

    def _spoken_before(self, calls: Calls) -> Node:
        """As `_spoken`; behind any text calls may come."""
        behind = calls.behind_text() if self._answer is None else []
        # What stands around all names, not each call's beginning: as many marks as tools would stand in as many spans.
        unless, marks = self._beginnings(), calls.marks_behind_text()
        called = (row(Span(close=text, unless=unless, marks=marks), rest) for text, rest in behind)
        return either(*called, Span(unless=unless, marks=marks)) if behind else self._spoken()

    def _answered(self) -> Node:
        assert self._answer is not None
        return self._answer.node(self._beginnings(thoughts=self._may_think))
