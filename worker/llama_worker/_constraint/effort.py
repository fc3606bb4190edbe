"""How much work a validator has with one value, told without doing it.

References to the same place multiply: a few definitions that each refer twice to the next are 2**n checks, and a
validator can neither be interrupted nor does it let other threads run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from llama_worker._constraint.references import Document

_LEAST: Final = 50_000  # steps that any value may cost: at most some 10 ms of a validator, some 50 ms here
_A_VALUE: Final = 50  # steps more for each value in it: far less than it costs to sample its token
_MOST_REFERRED: Final = 200_000
_LISTS: Final = ("allOf", "anyOf", "oneOf")
_SINGLES: Final = ("if", "then", "else", "not")
_MAPS: Final = ("dependentSchemas", "dependencies")
_OF_ITEMS: Final = ("items", "additionalItems", "unevaluatedItems", "contains")
_OF_MEMBERS: Final = ("additionalProperties", "unevaluatedProperties")
_Step: TypeAlias = tuple[Any, Any, frozenset[str]]  # a schema, a value, and the references that led to it
_NONE: Final[frozenset[str]] = frozenset()


def is_costly(document: Document, value: object) -> bool:
    """Whether checking `value` takes more steps than are reasonable for one of its size."""
    return _steps(document, document.root, value, _LEAST + _A_VALUE * _size(value)) < 0


def refers_too_often(document: Document) -> bool:
    """Whether what is said about one and the same value, references written out, is out of bounds."""
    left = _MOST_REFERRED
    for schema in (document.root, *map(document.pointed, document.references)):
        left = _steps(document, schema, None, left)
    return left < 0


def _steps(document: Document, schema: Any, value: Any, left: int) -> int:
    """What is left of `left` steps; negative if they were too few. Without recursion."""
    todo: list[_Step] = [(schema, value, _NONE)]
    while todo and left >= 0:
        schema, value, followed = todo.pop()
        if not isinstance(schema, dict):
            continue
        more: list[_Step] = [(part, value, followed) for part in _beside(schema)]
        if "unevaluatedProperties" in schema or "unevaluatedItems" in schema:
            more *= 2  # what stands beside it is evaluated again to know what is left
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in followed:  # else it leads in a circle
            more.append((document.pointed(reference), value, followed | {reference}))
        more += ((part, child, _NONE) for part, child in _inside(schema, value))
        left -= 1 + len(more) + _length(schema.get("enum")) // 16
        todo += more
    return left


def _beside(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas that are asked about the same value."""
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from schema[key]
    for key in _SINGLES:
        if key in schema:
            yield schema[key]
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            yield from schema[key].values()


def _inside(schema: dict[str, Any], value: Any) -> Iterator[tuple[Any, Any]]:
    """The schemas that are asked about the items and members of `value`, each with what it is asked about."""
    if isinstance(value, list):
        for key in ("prefixItems", "items"):
            if isinstance(schema.get(key), list):
                yield from zip(schema[key], value, strict=False)
        for key in _OF_ITEMS:
            if isinstance(schema.get(key), dict):
                yield from ((schema[key], item) for item in value)
    elif isinstance(value, dict):
        yield from _of_members(schema, value)


def _of_members(schema: dict[str, Any], value: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    own = schema.get("properties")
    own = own if isinstance(own, dict) else {}
    yield from ((own[name], member) for name, member in value.items() if name in own)
    patterns = schema.get("patternProperties")
    for part in patterns.values() if isinstance(patterns, dict) else ():
        yield from ((part, member) for member in value.values())
    for key in _OF_MEMBERS:
        if isinstance(schema.get(key), dict):
            yield from ((schema[key], member) for name, member in value.items() if name not in own)
    if isinstance(schema.get("propertyNames"), dict):
        yield from ((schema["propertyNames"], name) for name in value)


def _size(value: object) -> int:
    size, level = 0, [value]
    while level:
        size += len(level)
        level = [child for parent in level for child in _children(parent)]
    return size


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _length(values: object) -> int:
    return len(values) if isinstance(values, list) else 0
