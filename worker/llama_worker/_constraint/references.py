"""References within one schema, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote


def declared(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`parameters`, or what its reference at the root means: where the properties are declared."""
    schema: Any = parameters
    for _ in range(8):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or "properties" in schema:
            break
        schema = pointed(parameters, reference)
    return schema if isinstance(schema, dict) else dict(parameters)


def resolved(schema: object, root: object) -> dict[str, Any]:
    """`schema`, or what its references mean; of several possibilities the one that is not null."""
    for _ in range(8):
        if not isinstance(schema, dict):
            return {}
        if isinstance(schema.get("$ref"), str):
            schema = pointed(root, schema["$ref"])
            continue
        several = (schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list))
        options: list[Any] = [option for option in next(several, []) if option != {"type": "null"}]
        if len(options) != 1:
            break
        schema = options[0]
    return schema if isinstance(schema, dict) else {}


def pointed(document: Any, reference: str) -> Any:
    """What a local reference means; None if there is nothing."""
    pointer = reference[1:]
    if pointer and not pointer.startswith("/"):
        return next((node for node in _nodes(document) if pointer in (node.get("$anchor"), node.get("$id"))), None)
    for raw in pointer.split("/")[1:]:
        step = _unescaped(raw)
        if isinstance(document, list) and step.isdecimal() and int(step) < len(document):
            document = document[int(step)]
        elif isinstance(document, dict) and step in document:
            document = document[step]
        else:
            return None
    return document


def _unescaped(step: str) -> str:
    return unquote(step).replace("~1", "/").replace("~0", "~")


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        children = [child for key, child in value.items() if key not in ("enum", "const", "default", "examples")]
    else:
        children = value if isinstance(value, list) else []
    for child in children:
        yield from _nodes(child)
