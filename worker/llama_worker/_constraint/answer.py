"""The text of a reply as `response_format` wants it, as rules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from llama_worker._constraint.rules import Check, Given, Json, Node, Plain, Schema, Span, either
from llama_worker._constraint.schema import read_schema
from llama_worker._errors import Hidden, InvalidRequestError
from llama_worker._requests import ResponseFormat

_MOST_CHARACTERS: Final = 256 << 10
_NAME: Final = "answer"


_FIELDS: Final[dict[str, str]] = {
    "json_object": "response_format",
    "json_schema": "response_format.json_schema",
    "regex": "response_format.regex",
    "choice": "response_format.choices",
    "lark": "response_format.grammar",
    "gbnf": "response_format.grammar",
}


class Answer:
    """What the text must be; `field` is where the caller said so. Raises InvalidRequestError."""

    def __init__(self, wanted: ResponseFormat) -> None:
        self._wanted = wanted
        self.field = _FIELDS[wanted.type]
        self.rules: list[tuple[str, Node]] = []
        self.schemas: list[tuple[str, Schema]] = []
        self.checks: list[Check] = []
        for text in (wanted.regex, wanted.grammar, *(wanted.choices or ())):
            if text is not None:
                self._require_usable(text)
        if wanted.type in ("json_object", "json_schema"):
            self._read_schema()

    def _require_usable(self, text: str) -> None:
        if len(text) > _MOST_CHARACTERS:
            raise InvalidRequestError(
                self.field, Hidden(text), f"longer than {_MOST_CHARACTERS} characters; shorten it"
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidRequestError(self.field, Hidden(text), "half a surrogate pair is no character; leave it out")

    def _read_schema(self) -> None:
        given = self._wanted.json_schema if self._wanted.type == "json_schema" else {"type": "object"}
        schema = read_schema(given, self.field, strict=bool(self._wanted.strict))
        self.schemas.append((_NAME, schema))
        self.checks.append(Check(tool=None, schema=schema, parts=(_NAME,)))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its schemas."""
        return tuple(name for name, _ in self.schemas)

    @property
    def schema(self) -> Schema:
        """That of the answer, if it is JSON."""
        return self.schemas[0][1]

    def become(self, schema: Schema) -> None:
        """Have `schema` compiled, of which the answer is one of several values."""
        self.schemas = [(_NAME, schema)]

    def node(self, unless: tuple[str, ...]) -> Node:
        """The text; it does not begin with any of `unless`, which would be no text."""
        wanted = self._wanted
        match wanted.type:
            case "json_object" | "json_schema":
                return Json(_NAME)
            case "regex":
                return Span(patterns=(_unanchored(wanted.regex or ""),), unless=unless)
            case "choice":
                return either(*(Plain(text) for text in self._choices(unless)))
            case "lark" | "gbnf" as kind:
                return Given(kind, wanted.grammar or "", unless)

    def _choices(self, unless: tuple[str, ...]) -> list[str]:
        texts = list(dict.fromkeys(self._wanted.choices or ()))
        if sum(map(len, texts)) > _MOST_CHARACTERS:
            raise InvalidRequestError(
                self.field, Hidden(texts), f"over {_MOST_CHARACTERS} characters together; give fewer"
            )
        for text in texts:
            for begun in beginnings(unless):
                if text.startswith(begun):
                    raise InvalidRequestError(self.field, Hidden(text), misread(begun))
        return texts


def beginnings(unless: Iterable[str]) -> tuple[str, ...]:
    """How a text begins that would be read as what one of `unless` begins: after a thought come two line breaks."""
    return tuple(blanks + mark for mark in unless for blanks in ("", "\n", "\n\n"))


def misread(begun: str) -> str:
    """Why a text must not begin so."""
    mark = begun.lstrip("\n")
    return (
        f"it may begin with {mark!r}, and so does a thought, a call or any answer of this model; begin it with "
        "something else, or leave thoughts (enable_thinking=False) and tools out"
    )


def _unanchored(regex: str) -> str:
    """It always is the whole text that must match, so anchors at both ends say nothing new."""
    ends = regex.endswith("$") and not regex.endswith("\\$")
    return regex[regex.startswith("^") : len(regex) - ends]
