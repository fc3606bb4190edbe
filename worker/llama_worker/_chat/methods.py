"""Methods of texts, lists and mappings: what they cost, and which are refused for their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError

from llama_worker._chat.bounds import ITEM, PIECE, bound_padding, bound_product, paid, weight
from llama_worker._chat.fuel import make, scan, step


def call_method(owner: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A method of a text, a list, a tuple or a mapping."""
    if isinstance(owner, str):
        args = _bound_text_method(owner, method.__name__, args, kwargs)
    else:
        args = tuple(_listed(arg) for arg in args)
        if type(next(iter(args), None)) is tuple:  # a key, perhaps
            weight(args[0])
        if method.__name__ in ("extend", "update", "fromkeys"):
            make(2 * ITEM * sum(len(arg) for arg in args if hasattr(arg, "__len__")))
        elif method.__name__ in ("sort", "index", "count", "remove"):
            weight(owner)
        elif method.__name__ in ("copy", "pop", "insert", "reverse"):
            step(len(owner))
    result = method(*args, **kwargs)
    return paid(result) if type(result) in (str, list, tuple) else result


def _listed(value: Any) -> Any:
    """An iterator as a list: it might read from what it is put into."""
    return list(value) if hasattr(value, "__next__") else value


def _bound_text_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    longest = max((len(arg) for arg in args if isinstance(arg, str)), default=0)
    scan(len(text) + longest)
    if name in _PAIRWISE:
        scan(len(text) * longest)
    bound = _TEXT_BOUNDS.get(name)
    return args if bound is None else bound(text, args, kwargs)


_PAIRWISE = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"})


def _pads(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    bound_padding(*args, **kwargs)
    return args


def _joins(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    parts = [list(arg) if isinstance(arg, Iterable) else arg for arg in args]
    for part in parts:
        if isinstance(part, list):
            bound_product(1, weight(part) + len(part) * len(text))
    return tuple(parts)


def _replaces(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    if len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        bound_product(text.count(args[0]), len(args[1]))
    return args


def _splits(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    separator = kwargs.get("sep", args[0] if args else None)
    make(PIECE * (text.count(separator) if isinstance(separator, str) and separator else len(text) // 2))
    return args


def _splits_lines(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    make(PIECE * len(text) // 2)
    return args


def _is_refused(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    raise SecurityError("calls a method of texts that templates have no need of")


_TEXT_BOUNDS: dict[str, Callable[[str, tuple[Any, ...], dict[str, Any]], tuple[Any, ...]]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _pads),
    **dict.fromkeys(("split", "rsplit"), _splits),
    **dict.fromkeys(("translate", "maketrans", "expandtabs", "encode"), _is_refused),
    "splitlines": _splits_lines,
    "join": _joins,
    "replace": _replaces,
}
