"""JSON as it comes: where a value ends, what an escaped string says, and whether a text is one strict object."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from llama_worker._chat.source import MalformedError

MOST_NESTED = 200
"""Deeper objects and lists are refused: whoever reads the arguments later would run out of stack."""

_PLAIN = re.compile(r'[^"{}\[\]]*')
_STRING = re.compile(r'(?:[^"\\]+|\\.)*', re.DOTALL)
_SCALAR = re.compile(r"[-+.0-9A-Za-z_]*")


class ValueScanner:
    """Finds the end of one JSON value, without judging what is in it. It begins at the value's first character."""

    __slots__ = ("_depth", "_in_string", "_kind", "_skip", "done")

    def __init__(self) -> None:
        self._kind = ""
        self._depth = 0
        self._in_string = False
        self._skip = False  # the last character was a backslash in a string
        self.done = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value; `done` says that the value ended within them.

        A bare number or word ends only where another character comes; it may be empty.
        """
        if not self._kind and text:
            self._kind = "nested" if text[0] in "{[" else "string" if text[0] == '"' else "scalar"
        if self._kind == "scalar":
            return self._scalar(text)
        at = 0
        while at < len(text) and not self.done:
            at = self._string(text, at) if self._in_string else self._structure(text, at)
        return at

    def _scalar(self, text: str) -> int:
        found = _SCALAR.match(text)
        end = found.end() if found else 0
        self.done = end < len(text)
        return end

    def _structure(self, text: str, at: int) -> int:
        found = _PLAIN.match(text, at)
        at = found.end() if found else at
        if at == len(text):
            return at
        if text[at] == '"':
            self._in_string = True
        else:
            self._depth += 1 if text[at] in "{[" else -1
            self.done = self._depth == 0
        return at + 1

    def _string(self, text: str, at: int) -> int:
        if self._skip:
            self._skip, at = False, at + 1
        found = _STRING.match(text, at)
        at = found.end() if found else at
        if at == len(text):
            return at
        self._in_string = text[at] == "\\"
        self._skip = self._in_string  # a backslash that ends the text
        self.done = not self._in_string and self._depth == 0
        return at + 1


_HEX = "[0-9a-fA-F]"
_HIGH = rf"\\u[dD][89abAB]{_HEX}{{2}}"
_LOW = rf"\\u[dD][c-fC-F]{_HEX}{{2}}"
# A high surrogate waits for what follows: only then it is known whether both are one character.
_UNITS = re.compile(
    rf"""(?:[^"\\]+|\\["\\/bfnrt]|\\u(?![dD][89abAB]){_HEX}{{4}}"""
    rf"""|{_HIGH}(?:{_LOW}|(?=[^\\]|\\[^u]|\\u{_HEX}{{4}})))*"""
)
_UNIT_BEGUN = re.compile(rf"(?:{_HIGH})?(?:\\(?:u{_HEX}{{0,3}})?)?")


def unescaped(text: str) -> tuple[str, int]:
    """What the inside of a JSON string says up to its end or to half an escape, and how long that is in `text`.

    Raises MalformedError where `text` begins with an escape that JSON does not know.
    """
    found = _UNITS.match(text)
    end = found.end() if found else 0
    if end == 0 and text[:1] == "\\" and not _UNIT_BEGUN.fullmatch(text):
        raise MalformedError("the arguments have an escape that JSON does not know")
    said = text[:end]
    return (json.loads(f'"{said}"', strict=False) if "\\" in said else said), end


def escaped(text: str) -> str:
    """`text` as the inside of a JSON string. What is escaped in pieces, joined, is the whole escaped."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MAYBE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def strict_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is, whole. Raises MalformedError for anything else.

    Refused are also what Python would take: NaN and infinite numbers, half characters. Of a key that stands twice the
    last one counts, as for whoever reads the pieces that were told: a grammar cannot forbid it where any key may stand.
    """
    try:
        value = _STRICT.decode(text)
    except json.JSONDecodeError as exc:
        raise MalformedError(f"the arguments are no JSON: {exc.msg} at character {exc.pos}") from None
    except (ValueError, RecursionError):  # a number of more digits than Python reads; too deep
        raise MalformedError("the arguments have a number or a nesting beyond what can be read") from None
    if not isinstance(value, dict):
        raise MalformedError("the arguments are no JSON object")
    if text.count("{") + text.count("[") > MOST_NESTED and _is_deep(value):
        raise MalformedError(f"the arguments are nested deeper than {MOST_NESTED}")
    if _MAYBE_SURROGATE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise MalformedError("the arguments have half a surrogate pair")
    return value


def _is_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)


def _no_constant(name: str) -> NoReturn:
    raise MalformedError(f"the arguments have {name}, which is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise MalformedError("the arguments have a number that is too large")
    return number


_STRICT = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
