"""Which parameters of a tool are text: Tagged arguments write these as they are, and all others as JSON.

Grammar, parser and writer of calls all ask here, so that they agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from llama_worker._requests import ToolSpec

_MOST_SCHEMAS = 100
"""How many subschemas are looked at for one parameter, however they refer to each other."""


def text_parameters(tool: ToolSpec) -> frozenset[str]:
    """The parameters that can be nothing but a string, or null.

    $ref, anyOf, oneOf, allOf, enum and const are looked through. A parameter that may also be a number, or
    anything, is none of them: as JSON all that it may be can be written. Where texts and values open differently, its
    strings are written as texts all the same (`mixed_parameters`).
    """
    return frozenset(name for name, types in _typed(tool) if "string" in types and types <= {"string", "null"})


def nullable_parameters(tool: ToolSpec) -> frozenset[str]:
    """Those of `text_parameters` that may be null."""
    return frozenset(name for name, types in _typed(tool) if types == {"string", "null"})


def mixed_parameters(tool: ToolSpec) -> frozenset[str]:
    """The parameters that can be a string, and null or anything else too."""
    return frozenset(name for name, types in _typed(tool) if types > {"string"})


def parameter_types(tool: ToolSpec) -> dict[str, frozenset[str]]:
    """The JSON types of which each parameter may be."""
    return dict(_typed(tool))


def types_of(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types of which a value of `schema`, which stands in `root`, may be."""
    return _types(schema, root, [_MOST_SCHEMAS])


def json_type(value: object) -> str:
    """The JSON name of a value's type; all numbers are "number"."""
    for kinds, name in _TYPES:
        if isinstance(value, kinds):
            return name
    raise TypeError(f"{type(value).__name__} is not a JSON type")


_TYPES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((str,), "string"),
    ((bool,), "boolean"),
    ((int, float), "number"),
    ((type(None),), "null"),
    ((dict,), "object"),
    ((list, tuple), "array"),
)
_ALL = frozenset(name for _, name in _TYPES)


def _typed(tool: ToolSpec) -> Iterator[tuple[str, frozenset[str]]]:
    properties = tool.parameters.get("properties")
    for name, schema in properties.items() if isinstance(properties, Mapping) else ():
        yield name, types_of(schema, tool.parameters)


def _types(schema: object, root: Mapping[str, Any], left: list[int]) -> frozenset[str]:
    """The types of which a value may be. `left[0]` counts down, so a schema that contains itself comes to an end."""
    left[0] -= 1
    if left[0] < 0 or not isinstance(schema, Mapping):
        return _ALL
    found = _own_types(schema)
    for key in ("anyOf", "oneOf"):
        if isinstance(some := schema.get(key), list) and some:
            found &= frozenset().union(*(_types(one, root, left) for one in some))
    every = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
    if isinstance(schema.get("$ref"), str):
        every.append(_referred(schema["$ref"], root))
    for one in every:
        found &= _types(one, root, left)
    return found


def _own_types(schema: Mapping[str, Any]) -> frozenset[str]:
    found = _ALL
    named = schema.get("type")
    if isinstance(named, str | list):
        names = {named} if isinstance(named, str) else set(filter(_is_text, named))
        found &= {"number" if name == "integer" else name for name in names}
    if "const" in schema:
        found &= _types_of([schema["const"]])
    if isinstance(schema.get("enum"), list):
        found &= _types_of(schema["enum"])
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _types_of(values: list[object]) -> frozenset[str]:
    try:
        return frozenset(map(json_type, values))
    except TypeError:
        return _ALL


def _referred(pointer: str, root: Mapping[str, Any]) -> object:
    """What a local $ref points at; None, which may be anything, where there is nothing."""
    found: object = root
    if not pointer.startswith("#"):
        return None
    for key in filter(None, unquote(pointer[1:]).split("/")):
        name = key.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found
