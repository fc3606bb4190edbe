"""Whether a finite value can be of a schema: one whose required parts need themselves has none."""

from __future__ import annotations

from typing import Any

from llama_worker._constraint.places import mapped
from llama_worker._constraint.references import nodes


def finite_definitions(defs: dict[str, Any]) -> set[str]:
    """The definitions of which a finite value can be: the least set that says so of itself."""
    users = _users(defs)
    able: set[str] = set()
    asked = set(defs)
    while asked:  # each time those for which something has changed
        more = {name for name in asked if has_value(defs[name], able)}
        able |= more
        asked = {user for name in more for user in users.get(name, ())} - able
    return able


def _users(defs: dict[str, Any]) -> dict[str, set[str]]:
    users: dict[str, set[str]] = {}
    for name, body in defs.items():
        for node in nodes(body):
            if isinstance(node.get("$ref"), str):
                users.setdefault(node["$ref"].removeprefix("#/$defs/"), set()).add(name)
    return users


def has_value(schema: Any, able: set[str]) -> bool:
    """Whether references, to the `able` ones alone, leave a value possible. Other contradictions are not seen here."""
    if not isinstance(schema, dict):
        return schema is not False
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in able:
        return False
    if not all(has_value(part, able) for part in schema.get("allOf", ())):
        return False
    if not all(any(has_value(part, able) for part in schema[key]) for key in ("anyOf", "oneOf") if key in schema):
        return False
    return _has_members(schema, able)


def _has_members(schema: dict[str, Any], able: set[str]) -> bool:
    kinds = schema.get("type")
    if kinds == "object" or kinds == ["object"]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(has_value(properties.get(name, others), able) for name in schema.get("required") or ())
    if (kinds == "array" or kinds == ["array"]) and schema.get("minItems"):
        first = [*schema.get("prefixItems", ()), schema.get("items", True)]
        return all(has_value(item, able) for item in first[: int(schema["minItems"])])
    return True


def without_dead(schema: Any, able: set[str]) -> Any:
    """References to definitions of which no value can be become `false`."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in able:
        return False
    return mapped(schema, lambda part: without_dead(part, able))
