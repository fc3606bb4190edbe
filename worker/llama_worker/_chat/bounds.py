"""Bounds: what values and operators cost, and which are refused for their size.

What grows by a factor is checked before it is made; what grows by a sum is paid for afterwards.
"""

from __future__ import annotations

import operator as operators
import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

from llama_worker._chat.fuel import OutOfFuel, make, scan, step

LARGEST = 16 * 2**20
"""Characters that one text may have."""

_MAX_PADDING = 10_000
_MAX_REPEATED = 100_000
_MAX_BITS = 4096
_DEEPEST = 64
ITEM = 8
"""What an item of a list counts, in characters."""
PIECE = 10
"""And one that is a text of its own."""


# -- values


def paid(value: Any) -> Any:
    """`value`, after paying for its size: for what was just made."""
    kind = type(value)
    if kind is str or isinstance(value, str):
        make(len(value))
    elif kind is list or kind is tuple or kind is dict:
        make(ITEM * len(value))
    elif kind is int and value.bit_length() > _MAX_BITS:
        raise SecurityError(f"makes a number of more than {_MAX_BITS} bits")
    return value


def weight(value: Any, levels: int = _DEEPEST) -> int:
    """About the characters of `value` when it is written, all that it holds included. Paid for as it is read.

    Lists that hold one list twice grow as a power of two when they are written or compared: this finds out.
    """
    if isinstance(value, str):
        return len(value) + 2
    if not isinstance(value, Mapping | list | tuple | set | ItemsView | KeysView | ValuesView):
        return 8
    step(8 + 8 * len(value))
    if not levels:
        raise SecurityError(f"nests more than {_DEEPEST} levels deep")
    parts = (part for pair in value.items() for part in pair) if isinstance(value, Mapping) else value
    total = 8 * len(value)
    for part in parts:
        total += weight(part, levels - 1)
        if total > LARGEST:
            raise OutOfFuel(f"it holds more than {LARGEST} characters")
    return total


SIMPLE = (str, int, float, bool, type(None), Undefined)
_WRITTEN = (Mapping, list, tuple, set, range, ItemsView, KeysView, ValuesView)


def written(value: Any) -> str:
    """`value` as text. Raises SecurityError for what is no data."""
    if isinstance(value, str):
        return value
    if not isinstance(value, SIMPLE):
        if not isinstance(value, _WRITTEN):
            raise SecurityError(f"writes a {type(value).__name__}")
        weight(value)
    return str(paid(str(value)))


def finalized(value: Any) -> Any:
    """What an expression writes into the prompt."""
    return value if isinstance(value, SIMPLE) else written(value)


def side(value: Any) -> Any:
    """One side of a comparison."""
    if isinstance(value, str):
        scan(len(value))
    elif not isinstance(value, SIMPLE):
        weight(value)
    return value


def is_in(value: Any, container: Any) -> bool:
    if isinstance(container, str):
        scan(len(container) * 2)
    elif isinstance(container, list | tuple | range | ValuesView | ItemsView):
        # Each item is compared, as far as `value` goes.
        step(2 * len(container) * (1 + (0 if isinstance(value, SIMPLE) else weight(value) // 8)))
    elif not isinstance(value, SIMPLE):
        weight(value)
    return bool(operators.contains(container, value))


def concatenated(pieces: Iterable[str]) -> str:
    """What blocks and macros are joined by."""
    parts = list(pieces)
    make(sum(map(len, parts)))
    return "".join(parts)


def all_joined(values: list[Any]) -> str:
    """The operator `~`."""
    return concatenated(map(written, values))


# -- operators


def add(left: Any, right: Any) -> Any:
    return paid(left + right)


def multiply(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Sequence) and isinstance(other, int) and len(one) * other > _MAX_REPEATED:
            raise SecurityError("repeats a sequence too often")
        if isinstance(one, int) and one.bit_length() > 1024:
            raise SecurityError("multiplies by a number beyond 1024 bits")
    return paid(left * right)


def power(left: Any, right: Any) -> Any:
    if not (isinstance(left, int | float) and isinstance(right, int | float)) or abs(left) > 10_000 or abs(right) > 64:
        raise SecurityError("takes a power that is too large")
    return paid(left**right)


def modulo(left: Any, right: Any) -> Any:
    return paid(printf(left, right) if isinstance(left, str) else left % right)


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": add,
    "*": multiply,
    "**": power,
    "%": modulo,
    "-": operators.sub,
    "/": operators.truediv,
    "//": operators.floordiv,
}

_PRINTF_WIDTH = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{5}|\*)")
_FORMAT_WIDTH = re.compile(r"\d{5}|:[^}]*\{")


def printf(form: str, values: Any) -> str:
    scan(len(form))
    if _PRINTF_WIDTH.search(form):
        raise SecurityError("formats to a width that is too large or not constant")
    bound_product(form.count("%"), weight(values))
    return str(form % values)


def formatting(form: str, write: Callable[..., str]) -> Callable[..., str]:
    """The method `format` of `form`; `write` is the sandbox's."""

    def checked(*args: Any, **kwargs: Any) -> str:
        scan(len(form))
        if _FORMAT_WIDTH.search(form):
            raise SecurityError("formats to a width that is too large or not constant")
        bound_product(form.count("{"), weight([args, kwargs]))
        return str(paid(write(*args, **kwargs)))

    return checked


def bound_product(count: int, size: int) -> None:
    """Raises OutOfFuel where `count` texts of `size` would be too much."""
    if count * size > LARGEST:
        raise OutOfFuel(f"it makes a text of more than {LARGEST} characters")


def bound_padding(*args: Any, **kwargs: Any) -> None:
    """Raises SecurityError for a width that is too large."""
    if any(isinstance(value, int) and abs(value) > _MAX_PADDING for value in (*args, *kwargs.values())):
        raise SecurityError(f"pads, or takes a width, beyond {_MAX_PADDING}")


def bound_indent(lines: int, indent: Any) -> None:
    """Raises OutOfFuel where `indent`, a text or a width, is too much for `lines`."""
    bound_padding(indent)
    bound_product(lines, len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0)


# -- what the syntax tree is rewritten to (`fuel.costly`)


def a_round(cost: int) -> None:
    """A body pays before it runs."""
    step(cost)


def a_test(value: Any, cost: int) -> Any:
    """The test of a loop."""
    step(8 + cost)
    return value


OPERATIONS: dict[str, Callable[..., Any]] = {
    "a round": a_round,
    "a test": a_test,
    "a slice": paid,
    "a key": side,
    "a side": side,
    "is in": is_in,
    "all joined": all_joined,
}
