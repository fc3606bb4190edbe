"""Plain JSON out of what a caller gave: in bounds, and nothing in it but what JSON knows."""

from __future__ import annotations

import json
from typing import Any, Final

from llama_worker._errors import InvalidRequestError

_DEEPEST: Final = 100  # llguidance reads at most 128 levels, some of which we add
_MOST_VALUES: Final = 200_000
_MOST_BYTES: Final = 4 << 20


def json_text(value: object, field: str) -> str:
    """`value` as JSON. Raises InvalidRequestError where it is too deep, too large or no JSON."""
    _require_bounds(value, field)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        n_bytes = len(text.encode())
    except (TypeError, ValueError) as exc:
        raise InvalidRequestError(field, type(value).__name__, f"it is no plain JSON: {exc}") from None
    if n_bytes > _MOST_BYTES:
        raise InvalidRequestError(field, f"<{n_bytes} bytes>", f"longer than {_MOST_BYTES} bytes; make it shorter")
    return text


def is_deeper(value: object, most: int) -> bool:
    """Whether `value` has more than `most` levels of lists and objects. Never recurses."""
    level = _children([value])
    for _ in range(most):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return True


def _require_bounds(value: object, field: str) -> None:
    """Without recursion: what is nested too deeply, or contains itself, must not overflow a stack here."""
    seen = 0
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [child for parent in level for child in _children(parent)]
        seen += len(level)
        if not level:
            return
        if seen > _MOST_VALUES:
            raise InvalidRequestError(field, f"<over {_MOST_VALUES} values>", "too large; make it shorter")
    raise InvalidRequestError(
        field, f"<over {_DEEPEST} levels>", f"nested more than {_DEEPEST} levels deep; use $defs and $ref"
    )


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [child for child in value.values() if isinstance(child, dict | list | tuple)]
    return (
        [child for child in value if isinstance(child, dict | list | tuple)] if isinstance(value, list | tuple) else []
    )
