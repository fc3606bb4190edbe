"""read_arguments: the arguments of a call, told as the text of one JSON object while they come."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llama_worker._chat.format import Tagged
from llama_worker._chat.json_text import ValueScanner, escaped, unescaped
from llama_worker._chat.literals import Literal, read_literal, which_comes
from llama_worker._chat.parameters import mixed_parameters, nullable_parameters, text_parameters
from llama_worker._chat.source import MalformedError, Reading, Source
from llama_worker._chat.words import WordEnd, read_word
from llama_worker._requests import ToolSpec

Tell = Callable[[str], None]
_PIECE = 1024
_TYPE = re.compile(r"[a-z]+")


def read_json(source: Source, tell: Tell) -> Reading[None]:
    """A JSON value, told as it is. Whether it is an object is not seen before its end."""
    yield from _wait_for_value(source)
    yield from _read_value(source, tell)


def read_json_string(source: Source, tell: Tell, *, is_open: bool) -> Reading[None]:
    """A JSON string, told as what it says. `is_open`: its quotes stand outside of the arguments."""
    if not is_open:
        yield from read_literal(source, Literal.of('"', after_blanks=True), "the arguments")
    while not source.starts_with('"'):
        text, length = unescaped(source.peek(_PIECE))
        source.take(length)
        if text:
            tell(text)
        if length == 0 or source.is_empty:
            yield from source.more()
    if not is_open:
        source.take(1)


def _wait_for_value(source: Source) -> Reading[None]:
    source.take_blanks()
    while source.is_empty:
        yield from source.more()
        source.take_blanks()


def _read_value(source: Source, tell: Tell) -> Reading[None]:
    scanner = ValueScanner()
    while not scanner.done:
        if source.is_empty:
            yield from source.more()
        piece = source.take(scanner.feed(source.peek(_PIECE)))
        if piece:
            tell(piece)


@dataclass(frozen=True, slots=True)
class ArgumentLine:
    """The parts of one tagged argument, and what tells whether another one comes."""

    next: Literal
    """What begins the second argument and all after it."""
    first: Literal
    string_open: Literal
    string_close: str
    value_open: Literal
    value_close: Literal
    opens_alike: bool
    """A text and a value begin with the same."""
    key_ends: tuple[WordEnd, ...]
    key_again: str | None
    type_close: str | None
    json_strings: bool

    @classmethod
    def of(cls, syntax: Tagged) -> ArgumentLine:
        opens = [syntax.value_open] if syntax.json_strings else [syntax.string_open, syntax.value_open]
        return cls(
            next=Literal.of(syntax.between + syntax.key_open, after_blanks=True),
            first=Literal.of(syntax.key_open, after_blanks=True),
            string_open=Literal.exact(syntax.string_open),
            string_close=syntax.string_close,
            value_open=Literal.of(syntax.value_open),
            value_close=Literal.of(syntax.value_close, after_blanks=True),
            opens_alike=syntax.opens_alike,
            key_ends=tuple(dict.fromkeys(WordEnd.before(text) for text in opens if text)),
            key_again=syntax.key_again,
            type_close=syntax.type_close,
            json_strings=syntax.json_strings,
        )


class TaggedReader:
    """Reads arguments of which each is written by itself. `after`: what stands behind the last one, if anything."""

    __slots__ = ("_after", "_line", "_mixed", "_nullable", "_source", "_tell", "_texts", "_tool")

    def __init__(self, source: Source, tell: Tell, line: ArgumentLine, after: Literal | None, tool: ToolSpec | None):
        self._source = source
        self._tell = tell
        self._line = line
        self._after = after
        self._tool = tool
        self._texts = text_parameters(tool) if tool else frozenset[str]()
        self._mixed = mixed_parameters(tool) if tool else frozenset[str]()
        self._nullable = nullable_parameters(tool) if tool else frozenset[str]()

    def read(self) -> Reading[None]:
        self._tell("{")
        before = self._line.first
        while (yield from self._another(before)):
            yield from read_literal(self._source, before, "an argument")
            if before is not self._line.first:
                self._tell(", ")
            yield from self._argument()
            before = self._line.next
        self._tell("}")

    def _another(self, before: Literal) -> Reading[bool]:
        """Whether an argument comes, and not what stands behind the last one."""
        literals = [before] if self._after is None else [before, self._after]
        return (yield from which_comes(self._source, literals)) is before

    def _argument(self) -> Reading[None]:
        line = self._line
        key = yield from read_word(self._source, line.key_ends, self._keys, "the name of an argument")
        self._tell(f'"{escaped(key)}": ')
        if (yield from self._is_text(key)):
            yield from read_literal(self._source, line.string_open, "what opens a text")
            again = "" if line.key_again is None else key + line.key_again
            yield from self._text(line.string_close + again, may_be_null=line.opens_alike and key in self._nullable)
            return
        yield from read_literal(self._source, line.value_open, "what opens a value")
        if line.type_close is not None:
            yield from self._type(line.type_close)
        yield from _wait_for_value(self._source)
        yield from _read_value(self._source, self._tell)
        yield from read_literal(self._source, line.value_close, "what closes a value")
        if line.key_again is not None:
            yield from read_literal(self._source, Literal.exact(key + line.key_again), "what closes a value")

    @property
    def _keys(self) -> frozenset[str]:
        properties = self._tool.parameters.get("properties") if self._tool else None
        return frozenset(properties) if isinstance(properties, dict) else frozenset()

    def _is_text(self, key: str) -> Reading[bool]:
        """By the tool's schema; where that allows more than it, or does not know the key, by how it is written."""
        line = self._line
        if line.json_strings:
            return False
        if (line.opens_alike or key not in self._mixed) and (key in self._texts or key in self._keys):
            return key in self._texts
        if line.opens_alike:
            return self._tool is None
        return (yield from which_comes(self._source, [line.string_open, line.value_open])) is line.string_open

    def _type(self, close: str) -> Reading[None]:
        kind = yield from read_word(self._source, [WordEnd.before(close)], (), "the type of a value")
        if not _TYPE.fullmatch(kind):
            raise MalformedError("what names the type of a value is no type")
        yield from read_literal(self._source, Literal.of(close, after_blanks=True), "the end of a type")

    def _text(self, close: str, *, may_be_null: bool) -> Reading[None]:
        """A string as it is, up to `close`."""
        source = self._source
        if may_be_null and (yield from which_comes(source, [Literal.exact("null" + close)])):
            source.take(len("null" + close))
            self._tell("null")
            return
        self._tell('"')
        while (length := source.find(close)) < 0:
            if text := source.take(source.before(close)):
                self._tell(escaped(text))
            yield from source.more()
        self._tell(escaped(source.take(length)) + '"')
        source.take(len(close))
