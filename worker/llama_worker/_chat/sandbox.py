"""The Jinja dialect of chat templates (that of Transformers), for templates from strangers.

Jinja's sandbox keeps attributes closed but bounds nothing: `'%9999999999d' % 1` fills the memory, two nested loops
never end. Here every step is paid for (`fuel.py`, `bounds.py`), so a template ends in bounded time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import BuiltinMethodType, GeneratorType
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import SandboxedEnvironment

from llama_worker._chat import bounds
from llama_worker._chat.filters import REFUSED_FILTERS, priced_filter, priced_test
from llama_worker._chat.fuel import costly, fuelled, step
from llama_worker._chat.methods import call_method
from llama_worker._chat.segments import MARKS

MAX_SOURCE = 2**18
"""Characters that a template may have."""

_CALL, _METHOD = 32, 8


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks replies for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Extension)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox, which keeps attributes closed, where calls, operators and joins are paid for."""

    intercepted_binops = frozenset({"+", "%", "*", "**"})
    concat = staticmethod(bounds.concatenated)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return bounds.OPERATORS[operator](left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, BuiltinMethodType) and isinstance(owner, str | list | dict | tuple):
            kwargs.pop("_block_vars", None)
            kwargs.pop("_loop_vars", None)
            step(_METHOD)
            return call_method(owner, __obj, args, kwargs)
        step(_CALL)
        if isinstance(owner, type):
            raise SecurityError("calls a method of a class")
        if __obj is dict or isinstance(owner, LoopContext):  # they make keys of it, or compare it
            bounds.weight(list(args))
        return bounds.paid(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) is tuple:  # its hash is made by a recursion that nothing bounds
            bounds.weight(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        return None if wrapped is None else bounds.formatting(value.__self__, wrapped)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Transformers' filter: no HTML escapes, Unicode as it is. Takes generators (`map`, `select`) as lists."""
    if isinstance(value, GeneratorType):
        value = list(value)
    items = bounds.weight(value) // 8
    if indent is not None:
        bounds.bound_indent(items * _depth(value), indent)
    if separators is not None:
        bounds.bound_product(items, sum(map(len, separators)))
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )
    return str(bounds.paid(_with_marks(text) if ensure_ascii else text))


def _depth(value: Any) -> int:
    """Levels of nesting; `weight` has seen that they are few."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 + max(map(_depth, parts), default=0)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, GeneratorType):
        raise TypeError(f"tojson cannot take a {type(value).__name__}")
    items = list(value)
    bounds.weight(items)
    return items


def _with_marks(text: str) -> str:
    """The marks around control texts must outlive JSON's escaping, or they would not be found."""
    for mark in MARKS:
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(bounds.written(message))


def _environment() -> SandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=bounds.finalized,
        extensions=[_Generation, loopcontrols],
    )
    for name in REFUSED_FILTERS:
        del environment.filters[name]
    for name, apply in environment.filters.items():
        environment.filters[name] = priced_filter(name, apply)
    tests = cast("dict[str, Callable[..., Any]]", environment.tests)
    for name, test in tests.items():
        tests[name] = priced_test(name, test)
    environment.filters |= bounds.OPERATIONS | {"tojson": _tojson, "string": bounds.written}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    return environment


_ENVIRONMENT = _environment()  # Shared: templates cannot change it.


def compiled(source: str) -> jinja2.Template:
    """The template `source`, each step of which is paid for. Render it within `fuelled`.

    Raises whatever Jinja and Python raise for what they cannot compile, SecurityError for what is too long.
    """
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"has more than {MAX_SOURCE} characters")
    with fuelled():  # Jinja works out constants
        return _ENVIRONMENT.from_string(costly(_ENVIRONMENT.parse(source)))
