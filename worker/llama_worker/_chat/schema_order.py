"""One order for the keys of a tool's schema: the same tool is the same tokens, whoever wrote it down.

A prefix is computed once only if it is the same from its first token on, and tools stand near the first. What JSON
gives no order is put into one: that of most tools that models were trained on. What has an order keeps it: lists,
and the names under `properties`, for in that order arguments are written (a `reason` before its `answer`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

_FIRST: Final = ("type", "description", "properties", "required", "items", "enum")
_NAMED: Final = frozenset({"$defs", "definitions", "patternProperties", "dependentSchemas"})
"""Keywords whose keys are names, without an order."""
_DATA: Final = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords whose values are no schemas."""


def in_order(schema: Any) -> Any:
    """A copy of plain data that is a JSON schema, with the keywords of each level in one order."""
    if isinstance(schema, Mapping):
        return {keyword: _value(keyword, schema[keyword]) for keyword in _ordered(schema)}
    return [in_order(item) for item in schema] if isinstance(schema, list | tuple) else schema


def _value(keyword: str, value: Any) -> Any:
    if keyword in _DATA:
        return _sorted(value)
    if keyword == "properties" and isinstance(value, Mapping):
        return {name: in_order(item) for name, item in value.items()}
    if keyword in _NAMED and isinstance(value, Mapping):
        return {name: in_order(value[name]) for name in sorted(value, key=str)}
    return in_order(value)


def _ordered(keywords: Iterable[Any]) -> list[Any]:
    return sorted(keywords, key=lambda word: (_FIRST.index(word) if word in _FIRST else len(_FIRST), str(word)))


def _sorted(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _sorted(data[key]) for key in sorted(data, key=str)}
    return [_sorted(item) for item in data] if isinstance(data, list | tuple) else data
