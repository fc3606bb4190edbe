"""Writing a Grammar in llguidance's Lark, for one vocabulary's control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llama_worker._constraint.rules import (
    Either,
    Given,
    Grammar,
    Json,
    Many,
    Maybe,
    Node,
    Opening,
    Pattern,
    Plain,
    Ref,
    Row,
    Span,
    Text,
)

_ANY: Final = "/(?s:.*)/"
_BLANKS: Final = "/[ \\t\\r\\n]*/"
_FEW_BLANKS: Final = "/[ \\t\\r\\n]{0,2}/"
# As the templates' own tojson writes it. No other blanks: small models would write them for ever, and what is
# certain need not be sampled.
_JSON: Final = {"key_separator": ": ", "item_separator": ", ", "whitespace_flexible": False}


class ControlTexts:
    """Finds the control tokens in what a template writes."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first))) if ids else None

    def split(self, text: str) -> list[str | int]:
        """`text` as pieces of plain text and ids of control tokens, in order; no piece is empty."""
        pieces: list[str | int] = []
        end = 0
        for match in self._any.finditer(text) if self._any else ():
            pieces += [text[end : match.start()], self._ids[match[0]]]
            end = match.end()
        return [piece for piece in [*pieces, text[end:]] if piece != ""]


def json_rule(schema: Any, *, lenient: bool, escapes: str) -> str:
    """The `%json` directive for one schema, given as a JSON value. `escapes`: what may follow a backslash."""
    options = {**_JSON, "json_allowed_escapes": escapes, **({"lenient": True} if lenient else {})}
    body = {"allOf": [schema]} if isinstance(schema, bool) else schema
    return "%json " + json.dumps({"x-guidance": options, **body}, ensure_ascii=False)


def grammar_text(
    grammar: Grammar,
    controls: ControlTexts,
    schemas: Mapping[str, str],
    *,
    regex: Callable[[str], str],
    given: Callable[[Given], str],
) -> str:
    """The grammar as llguidance reads it.

    `schemas`: the `%json` directive of each. `regex` escapes for `/.../`, `given` makes Lark of what it gets.
    """
    writer = _Writer(controls, regex, given)
    for name, node in grammar.rules:
        writer.rule(name, node)
    lines = writer.lines + [f"json_{name}: {directive}" for name, directive in schemas.items()]
    others = [{"name": name, "lark_grammar": source} for name, source in writer.sources.items()]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines) + "\n"}, *others]}, ensure_ascii=False)


@dataclass(slots=True)
class _Writer:
    controls: ControlTexts
    regex: Callable[[str], str]
    given: Callable[[Given], str]
    lines: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def rule(self, name: str, node: Node) -> None:
        body = self._expression(node)
        self.lines.append(f"{name}: {body}")

    def _expression(self, node: Node) -> str:
        match node:
            case Text() | Plain() | Opening() | Row():
                return self._row(node)
            case Pattern(regex):
                return self._terminal(f"/{self.regex(regex)}/")
            case Span():
                return self._span(node)
            case Json(schema):
                return f"json_{schema}"
            case Given():
                return self._given(node)
            case Ref(rule):
                return rule
            case Either(nodes):
                return "(" + " | ".join(map(self._expression, nodes)) + ")"
            case Maybe(inner):
                return f"({self._expression(inner)})?"
            case Many(inner):
                return f"({self._expression(inner)})*"

    def _row(self, node: Node) -> str:
        """Neighbouring literals become one: the lexer never turns back, so what begins alike is told apart whole."""
        parts: list[str] = []
        literal = ""
        for piece in self._pieces(node):
            if isinstance(piece, str):
                literal += piece
                continue
            parts += [quoted(literal)] if literal else []
            literal = ""
            parts.append(f"<[{piece}]>" if isinstance(piece, int) else self._piece(piece))
        parts += [quoted(literal)] if literal else []
        return " ".join(parts) or '""'

    def _piece(self, node: Node) -> str:
        return self._blanks(node.text) if isinstance(node, Opening) else self._expression(node)

    def _pieces(self, node: Node) -> Iterable[str | int | Node]:
        match node:
            case Text(text):
                yield from self.controls.split(text)
            case Plain(text):
                yield text
            case Opening(text):
                pieces = self.controls.split(text)
                yield Opening(pieces[0] if pieces and isinstance(pieces[0], str) else "")
                yield from pieces[1:] if pieces and isinstance(pieces[0], str) else pieces
            case Row(nodes):
                for inner in nodes:
                    yield from self._pieces(inner)
            case _:
                yield node

    def _blanks(self, text: str) -> str:
        return self._terminal(f"{_FEW_BLANKS} {quoted(text)}" if text else _FEW_BLANKS)

    def _span(self, span: Span) -> str:
        pieces = self.controls.split(span.close)
        body = self._body(span)
        if not pieces:
            return self._terminal(body)
        if len(pieces) == 1 and isinstance(pieces[0], str):
            return self._named(f"[suffix={quoted(pieces[0])}]", self._terminal(body))
        # What stands before the first control token is the end of the text before it.
        lead = pieces.pop(0) if isinstance(pieces[0], str) else ""
        text = self._terminal(f"({body}) {quoted(str(lead))}" if lead else body)
        rest = [quoted(piece) if isinstance(piece, str) else f"<[{piece}]>" for piece in pieces]
        return " ".join([text, *rest])

    def _body(self, span: Span) -> str:
        wanted = [self._terminal(f"/{self.regex(pattern)}/") for pattern in span.patterns] or [_ANY]
        spelled = filter(self._has_control, (span.close, *span.marks))
        refused = [f"{_ANY} {quoted(text)} {_ANY}" for text in _shortest((*span.without, *spelled))]
        # No text begins with a control token, but it may spell one.
        refused += [f"{_BLANKS} {quoted(text)} {_ANY}" for text in span.unless]
        if refused and not span.patterns:
            wanted = [self._terminal(_ANY)]
        return " & ".join(wanted + [f"~{self._terminal(text)}" for text in refused])

    def _has_control(self, text: str) -> bool:
        return any(isinstance(piece, int) for piece in self.controls.split(text))

    def _terminal(self, body: str) -> str:
        name = f"T{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def _named(self, options: str, body: str) -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}")
        return name

    def _given(self, given: Given) -> str:
        name = f"given{len(self.sources)}"
        self.sources[name] = self.given(given)
        return f"@{name}"


def _shortest(texts: tuple[str, ...]) -> list[str]:
    """Those with none of the others in them: what has not these has not the rest either."""
    return [text for text in dict.fromkeys(texts) if not any(other in text for other in texts if other != text)]


def quoted(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)
