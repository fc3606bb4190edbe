"""References within one schema, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import unquote

_NO_SCHEMAS = ("enum", "const", "default", "examples")


@dataclass
class Document:
    """One whole schema, to whose places references point. What was looked up once is known from then on."""

    root: Any
    _found: dict[str, Any] = field(default_factory=dict)

    def pointed(self, reference: str) -> Any:
        """What a local reference means; None if there is nothing."""
        if reference not in self._found:
            self._found[reference] = self._pointed(reference[1:])
        return self._found[reference]

    def declared(self) -> dict[str, Any]:
        """The root, or what its reference means: where the properties are declared."""
        schema: Any = self.root
        for _ in range(8):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(reference, str) or "properties" in schema:
                break
            schema = self.pointed(reference)
        return schema if isinstance(schema, dict) else dict(self.root)

    def resolved(self, schema: object) -> dict[str, Any]:
        """`schema`, or what its references mean; of several possibilities the one that is not null."""
        for _ in range(8):
            if not isinstance(schema, dict):
                return {}
            if isinstance(schema.get("$ref"), str):
                schema = self.pointed(schema["$ref"])
                continue
            several = (schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list))
            options: list[Any] = [option for option in next(several, []) if option != {"type": "null"}]
            if len(options) != 1:
                break
            schema = options[0]
        return schema if isinstance(schema, dict) else {}

    @property
    def id(self) -> Any:
        return self.root.get("$id") if isinstance(self.root, dict) else None

    @cached_property
    def refers_elsewhere(self) -> bool:
        """Whether a reference in it may mean a place of another document, or of a part with an `$id` of its own."""
        parts = [node for node in nodes(self.root) if isinstance(node.get("$id"), str) and node["$id"] != self.id]
        inner = any(isinstance(node.get("$ref"), str) for part in parts for node in nodes(part))
        return inner or not all(reference.startswith("#") for reference in self.references)

    @cached_property
    def references(self) -> tuple[str, ...]:
        """All that are in it, each once, and also those of parts that nobody refers to."""
        found = (node.get(key) for node in nodes(self.root) for key in ("$ref", "$dynamicRef", "$recursiveRef"))
        return tuple(dict.fromkeys(reference for reference in found if isinstance(reference, str)))

    @cached_property
    def _anchors(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for node in nodes(self.root):
            for key in ("$anchor", "$id"):
                if isinstance(node.get(key), str):
                    found.setdefault(node[key], node)
        return found

    def _pointed(self, pointer: str) -> Any:
        if pointer and not pointer.startswith("/"):
            return self._anchors.get(pointer)
        place = self.root
        for raw in pointer.split("/")[1:]:
            step = _unescaped(raw)
            if isinstance(place, list) and step.isdecimal() and int(step) < len(place):
                place = place[int(step)]
            elif isinstance(place, dict) and step in place:
                place = place[step]
            else:
                return None
        return place


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a schema that may be schemas, the outer ones first."""
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield node
            left += reversed([child for key, child in node.items() if key not in _NO_SCHEMAS])
        elif isinstance(node, list):
            left += reversed(node)


def _unescaped(step: str) -> str:
    return unquote(step).replace("~1", "/").replace("~0", "~")
