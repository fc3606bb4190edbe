"""Where schemas stand in a schema: beside a keyword, in a list, or under names that are no keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

MAPS: Final = ("properties", "patternProperties")
LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLES: Final = ("items", "additionalProperties")


def mapped(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """`schema` with each schema that stands directly in it changed."""
    changed = dict(schema)
    for key, value in schema.items():
        if key in (*MAPS, "$defs"):
            changed[key] = {name: change(part) for name, part in value.items()}
        elif key in LISTS:
            changed[key] = [change(part) for part in value]
        elif key in SINGLES:
            changed[key] = change(value)
    return changed


def levels(schema: Any) -> int:
    """How many schemas stand in each other at most, those that it refers to left out."""
    count, level = 0, [schema]
    while level:
        count += 1
        level = [part for outer in level if isinstance(outer, dict) for part in _parts(outer)]
    return count


def _parts(schema: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    mapped(schema, found.append)
    return found
