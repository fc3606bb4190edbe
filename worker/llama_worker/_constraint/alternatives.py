"""Alternatives of which no two hold, so that one of them (oneOf) is as much as any (anyOf)."""

from __future__ import annotations

from typing import Any

from llama_worker._constraint.references import Document


def told_apart(branches: list[Any], document: Document) -> bool:
    """Whether under one key each branch demands constants of its own: then no two hold."""
    seen: dict[str, list[Any]] = {}
    for branch in branches:
        for key, values in _constants(branch, document).items():
            seen.setdefault(key, []).append(values)
    return any(len(values) == len(branches) and _disjoint(values) for values in seen.values())


def _constants(branch: Any, document: Document) -> dict[str, list[Any]]:
    for _ in range(8):
        if not (isinstance(branch, dict) and isinstance(branch.get("$ref"), str)):
            break
        branch = document.pointed(branch["$ref"])
    if not isinstance(branch, dict) or branch.get("type") != "object":
        return {}
    properties, required = branch.get("properties"), branch.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    names = [key for key in required if isinstance(key, str)]
    return {key: values for key in names if (values := _fixed(properties.get(key)))}


def _fixed(schema: object) -> list[Any]:
    """The strings that a property must be one of, if it must."""
    if not isinstance(schema, dict):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


def _disjoint(groups: list[list[Any]]) -> bool:
    values = [value for group in groups for value in set(group)]
    return len(set(values)) == len(values)
