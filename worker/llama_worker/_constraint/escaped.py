"""Arguments as the text of a JSON string: JSON in which each quote and backslash is escaped once more.

llguidance cannot write a schema so. The shape is enforced here: keys, types, constants, required properties. What a
schema says beyond that is checked when the call is whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

from llama_worker._constraint.anything import ANYTHING, definitions
from llama_worker._constraint.rules import Either, Many, Maybe, Node, Pattern, Plain, Ref, either, row

_STRING: Final = r'\\"(?:[^"\\\x00-\x1f\x7f]|\\\\(?:[bfnrt]|\\"|\\\\))*\\"'
_INTEGER: Final = r"-?(?:0|[1-9][0-9]{0,17})"
_NUMBER: Final = _INTEGER + r"(?:\.[0-9]{1,17})?"


@dataclass(slots=True)
class EscapedJson:
    """Writes the rules for one schema as `schema.py` writes it; `name` begins their names.

    `quoted`: with the quotes around it.
    """

    name: str
    schema: Any
    quoted: bool = True
    rules: list[tuple[str, Node]] = field(default_factory=list)

    def node(self) -> Node:
        """The text. Fills `rules`."""
        defs = {**definitions(0), **(self.schema.get("$defs", {}) if isinstance(self.schema, dict) else {})}
        for name, body in defs.items():
            self.rules.append((f"{self.name}_{name}", self._value(body)))
        value = self._value(self.schema)
        return row(Plain('"'), value, Plain('"')) if self.quoted else value

    def _value(self, schema: Any) -> Node:
        if not isinstance(schema, dict):
            return self._value(ANYTHING)
        if "$ref" in schema:
            return Ref(f"{self.name}_{schema['$ref'].removeprefix('#/$defs/')}")
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return either(*(Plain(_escaped(json.dumps(value, ensure_ascii=False))) for value in values))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return either(*(self._value(option) for option in schema[key]))
        kinds = schema.get("type", ["any"])
        return either(*(self._kind(kind, schema) for kind in (kinds if isinstance(kinds, list) else [kinds])))

    def _kind(self, kind: str, schema: dict[str, Any]) -> Node:
        match kind:
            case "string":
                return Pattern(_STRING)
            case "integer":
                return Pattern(_INTEGER)
            case "number":
                return Pattern(_NUMBER)
            case "boolean":
                return Either((Plain("true"), Plain("false")))
            case "null":
                return Plain("null")
            case "array":
                return _listed("[", self._value(schema.get("items", True)), "]")
            case "object":
                return self._object(schema)
            case _:
                return self._value(ANYTHING)

    def _object(self, schema: dict[str, Any]) -> Node:
        properties = schema.get("properties", {})
        if not properties:
            others = schema.get("additionalProperties", True)
            pair = row(Pattern(_STRING), Plain(": "), self._value(others))
            return Plain("{}") if others is False else _listed("{", pair, "}")
        required = set(schema.get("required") or ())
        first: Node = Plain("}")
        after: Node = Plain("}")
        for key, sub in reversed(properties.items()):
            pair = row(Plain(_escaped(json.dumps(key, ensure_ascii=False)) + ": "), self._value(sub))
            written, later = row(pair, after), row(Plain(", "), pair, after)
            first = self._rule(written if key in required else either(written, first))
            after = self._rule(later if key in required else either(later, after))
        return row(Plain("{"), first)

    def _rule(self, node: Node) -> Node:
        name = f"{self.name}_o{len(self.rules)}"
        self.rules.append((name, node))
        return Ref(name)


def _listed(open_: str, item: Node, close: str) -> Node:
    return row(Plain(open_), Maybe(row(item, Many(row(Plain(", "), item)))), Plain(close))


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
