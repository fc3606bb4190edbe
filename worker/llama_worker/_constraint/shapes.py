"""Whether the keywords of a schema have values of the kind that they need: what reads them further may rely on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

_Kind: TypeAlias = tuple[Callable[[Any], bool], str]


def misshapen(schema: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first keyword whose value is of no use, and what it must be; None if all are."""
    for key, value in schema.items():
        if key in _KINDS and not _KINDS[key][0](value):
            return key, f"{key} is {_KINDS[key][1]}"
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)  # type: ignore[operator,call-overload]


_TEXT: Final[_Kind] = (_is_text, "a text")
_TEXTS: Final[_Kind] = (_is_texts, "a list of texts")
_NUMBER: Final[_Kind] = (_is_number, "a number")
_COUNT: Final[_Kind] = (_is_count, "a whole number that is not negative")
_LIST: Final[_Kind] = (lambda value: isinstance(value, list), "a list")
_SCHEMAS: Final[_Kind] = (lambda value: isinstance(value, dict), "an object with a schema for each name")
_KINDS: Final[Mapping[str, _Kind]] = {
    "type": (lambda value: _is_text(value) or _is_texts(value), "a text or a list of texts"),
    "required": _TEXTS,
    "enum": _LIST,
    **dict.fromkeys(("format", "pattern", "$ref", "$id"), _TEXT),
    **dict.fromkeys(("properties", "patternProperties"), _SCHEMAS),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), _NUMBER),
    # As draft 4 had them, they say how `minimum` and `maximum` are meant.
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"),
        (lambda value: _is_number(value) or isinstance(value, bool), "a number"),
    ),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), _COUNT),
}
