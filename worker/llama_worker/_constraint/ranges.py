"""The ranges of numbers, and the types that they belong to."""

from __future__ import annotations

from typing import Any, Final

MOST_INTEGER: Final = 9 * 10**18
"""What llguidance can count up to, nearly 64 bits."""


def bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """What is to be added, so that a number of `schema` is neither endless nor infinite."""
    least, most = -MOST_INTEGER, MOST_INTEGER
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    added: dict[str, Any] = {}
    if low is None and (high is None or (is_number(high) and high > least)):
        added["minimum"] = least
    if high is None and (low is None or (is_number(low) and low < most)):
        added["maximum"] = most
    return added


def kinds_of(schema: dict[str, Any]) -> set[Any]:
    """The types that `schema` names; {None} if it names none."""
    kinds = schema.get("type")
    return set(kinds if isinstance(kinds, list) else [kinds])


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
