"""Plain data: what templates are given is a deep copy that holds nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llama_worker._errors import InvalidRequestError

MOST_VALUES = 1_000_000
"""Values that one field may hold, nested ones included."""
DEEPEST = 64
"""Levels of nesting that it may have."""

_HALF: Final = re.compile("[\ud800-\udfff]")


def plain(value: Any, field: str) -> Any:
    """A deep copy of nothing but plain data, mappings' keys made text.

    Raises InvalidRequestError for anything else, for half a surrogate pair, for more than MOST_VALUES values and for a
    nesting deeper than DEEPEST, so also for what holds itself.
    """
    return _copied(value, field, DEEPEST, [MOST_VALUES])


def _copied(value: Any, field: str, levels: int, left: list[int]) -> Any:
    kind = type(value)
    if isinstance(value, str):
        return _whole(value, field)
    if value is None or isinstance(value, bool | int | float):
        return value
    is_mapping = kind is dict or isinstance(value, Mapping)
    # bytes are a sequence, but of numbers
    if not is_mapping and (not isinstance(value, Sequence) or isinstance(value, bytes | bytearray)):
        raise InvalidRequestError(field, kind.__name__, "a template is given plain data, as in JSON")
    left[0] -= 1 + len(value)
    if not levels or left[0] < 0:
        reason = f"it is nested more than {DEEPEST} levels deep, or has more than {MOST_VALUES} values"
        raise InvalidRequestError(field, kind.__name__, reason)
    if isinstance(value, Mapping):
        return {_whole(str(key), field): _copied(item, field, levels - 1, left) for key, item in value.items()}
    return [_copied(item, field, levels - 1, left) for item in value]


def _whole(text: str, field: str) -> str:
    if not text.isascii() and (found := _HALF.search(text)):
        reason = f"the character at {found.start()} is half a surrogate pair, which is no valid Unicode; leave it out"
        raise InvalidRequestError(field, f"<str, {len(text)} characters>", reason)
    return text
