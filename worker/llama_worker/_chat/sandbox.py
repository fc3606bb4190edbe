"""The Jinja dialect of chat templates (that of Transformers), for templates from strangers.

Jinja's sandbox keeps attributes closed but lets one operation fill the memory: `'%9999999999d' % 1`. Here those
that pad and repeat are bounded. Time, and memory that is filled in many steps, are not: a
template that loops for long blocks its caller, never the worker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import wraps
from types import GeneratorType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from llama_worker._chat.segments import MARKS

_MAX_PADDING = 10_000
_MAX_REPEATED = 100_000


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks replies for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Extension)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox, which keeps attributes closed, and bounds on single operations, which it lacks."""

    intercepted_binops = frozenset({"%", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _BOUNDS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(__obj, "__self__", None), str):
            _bound_padding(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _bound_format(value.__self__)
        return wrapped


def _bound_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Sequence) and isinstance(other, int) and len(one) * other > _MAX_REPEATED:
            raise SecurityError("repeats a sequence too often")
        if isinstance(one, int) and one.bit_length() > 1024:
            raise SecurityError("multiplies by a number beyond 1024 bits")


def _bound_power(left: Any, right: Any) -> None:
    if not (isinstance(left, int | float) and isinstance(right, int | float)) or abs(left) > 10_000 or abs(right) > 64:
        raise SecurityError("takes a power that is too large")


def _bound_modulo(left: Any, right: Any) -> None:
    if isinstance(left, str):
        _bound_printf(left)


_PRINTF_WIDTH = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{5}|\*)")
_FORMAT_WIDTH = re.compile(r"\d{5}|:[^}]*\{")


def _bound_printf(form: str) -> None:
    if _PRINTF_WIDTH.search(form):
        raise SecurityError("formats to a width that is too large or not constant")


def _bound_format(form: str) -> None:
    if _FORMAT_WIDTH.search(form):
        raise SecurityError("formats to a width that is too large or not constant")


def _bound_padding(*args: Any, **kwargs: Any) -> None:
    if any(isinstance(value, int) and value > _MAX_PADDING for value in (*args, *kwargs.values())):
        raise SecurityError(f"pads, or takes a width, beyond {_MAX_PADDING}")


_BOUNDS: dict[str, Callable[[Any, Any], None]] = {"*": _bound_product, "**": _bound_power, "%": _bound_modulo}


def _bounded(apply: Callable[..., Any], bound: Callable[..., None]) -> Callable[..., Any]:
    """The filter `apply`, refused where `bound` raises. Keeps the attributes by which Jinja knows filters."""

    @wraps(apply)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound(*args, **kwargs)
        return apply(*args, **kwargs)

    return checked


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Transformers' filter: no HTML escapes, Unicode as it is. Takes generators (`map`, `select`) as lists."""
    _bound_padding(indent)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )
    return _with_marks(text) if ensure_ascii else text


def _with_marks(text: str) -> str:
    """The marks around control texts must outlive JSON's escaping, or they would not be found."""
    for mark in MARKS:
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


def _listed(value: Any) -> list[Any]:
    if isinstance(value, GeneratorType):
        return list(value)
    raise TypeError(f"tojson cannot take a {type(value).__name__}")


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _environment() -> SandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name in ("center", "indent", "batch", "slice"):
        environment.filters[name] = _bounded(FILTERS[name], lambda _, *args, **kwargs: _bound_padding(*args, **kwargs))
    environment.filters["format"] = _bounded(FILTERS["format"], lambda form, *_, **__: _bound_printf(str(form)))
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


ENVIRONMENT = _environment()
"""Where chat templates are compiled. Shared: templates cannot change it."""
