"""Jinja's filters and tests: what they cost, and which are refused for their size."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError

from llama_worker._chat.bounds import (
    PIECE,
    SIMPLE,
    bound_indent,
    bound_padding,
    bound_product,
    is_in,
    paid,
    printf,
    side,
    weight,
    written,
)
from llama_worker._chat.fuel import make, scan, step

REFUSED_FILTERS = ("random", "striptags", "urlize")
"""Not a function of what they are given, or slower than what they are given is long; of no use in a prompt."""

_LAZY = frozenset({"length", "count", "first", "last", "default", "d", "items", "attr", "reverse"})
_LAZY |= {"map", "select", "reject", "selectattr", "rejectattr"}
_PADDING = frozenset({"center", "indent", "batch", "slice", "round", "truncate", "wordwrap"})
_SLOW = frozenset({"sort", "unique", "groupby", "dictsort", "min", "max", "pprint", "xmlattr", "escape", "e"})
_SLOW |= {"forceescape", "wordwrap", "title", "wordcount", "urlencode"}


def priced_filter(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `apply`, paying for what it reads and makes. Keeps the attributes by which Jinja knows filters."""
    extra = _FILTER_BOUNDS.get(name)
    skipped = 1 if hasattr(apply, "jinja_pass_arg") else 0

    @wraps(apply)
    def priced(*args: Any, **kwargs: Any) -> Any:
        given = args[skipped:]
        if name in _PADDING:
            bound_padding(*given[1:], **kwargs)
        _read(given, is_lazy=name in _LAZY, is_slow=name in _SLOW)
        if extra is not None:
            extra(*given, **kwargs)
        return paid(apply(*args, **kwargs))

    return priced


def _read(given: tuple[Any, ...], *, is_lazy: bool, is_slow: bool) -> None:
    step(16)
    for value in given:
        if isinstance(value, str):
            step(len(value)) if is_slow else scan(len(value))
        elif is_lazy:
            step(8 * len(value) if hasattr(value, "__len__") else 0)
        elif not isinstance(value, SIMPLE):
            size = weight(value)
            step(size if is_slow else 0)


def _bound_join(value: Any = (), d: Any = "", attribute: Any = None) -> None:
    if hasattr(value, "__len__"):
        bound_product(len(value), len(written(d)))


def _bound_replace(s: Any, old: Any, new: Any, count: Any = None) -> None:
    text, old, new = written(s), written(old), written(new)
    bound_product(text.count(old), len(new))


def _bound_indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    bound_indent(written(s).count("\n") + 1, width)


def _bound_wordwrap(
    s: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None, break_on_hyphens: Any = True
) -> None:
    if isinstance(wrapstring, str):
        bound_product(len(written(s)), len(wrapstring))


def _bound_trim(value: Any, chars: Any = None) -> None:
    if isinstance(chars, str):
        scan(len(chars) * len(written(value)))


def _bound_sum(iterable: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("adds up what are no numbers")


def _bound_list(value: Any) -> None:
    if isinstance(value, str):
        make(PIECE * len(value))


def _bound_format(value: Any, *args: Any, **kwargs: Any) -> None:
    printf(written(value), kwargs or args)


_FILTER_BOUNDS: dict[str, Callable[..., None]] = {
    "join": _bound_join,
    "replace": _bound_replace,
    "indent": _bound_indent,
    "wordwrap": _bound_wordwrap,
    "trim": _bound_trim,
    "sum": _bound_sum,
    "list": _bound_list,
    "format": _bound_format,
}


def priced_test(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The test `apply`, paying for what it reads."""
    if name == "in":
        return is_in
    if name not in _READING:
        return apply

    @wraps(apply)
    def priced(*args: Any) -> Any:
        return apply(*map(side, args))

    return priced


_READING = frozenset({"eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "upper", "lower"})
_READING |= {"gt", ">", "greaterthan", "ge", ">="}
