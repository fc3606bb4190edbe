"""Reader: goes through one JSON schema and writes it anew, as `schema.py` says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from llama_worker._constraint.alternatives import told_apart
from llama_worker._constraint.anything import ANYTHING, KINDS, definitions
from llama_worker._constraint.finite import finite_definitions, has_value, without_dead
from llama_worker._constraint.formats import LOOKAHEADS, NATIVE, PATTERNS, ecma
from llama_worker._constraint.keywords import FIXED, GAPS, NUMBERS, RANGE, REFUSED, VALUES, plain
from llama_worker._constraint.places import LISTS, MAPS, SINGLES, levels
from llama_worker._constraint.ranges import MOST_INTEGER, bounds, is_number, kinds_of
from llama_worker._constraint.references import Document, nodes
from llama_worker._constraint.shapes import misshapen
from llama_worker._errors import InvalidRequestError

JsonSchema: TypeAlias = dict[str, Any] | bool

_MOST_LEVELS: Final = 1000  # llguidance follows references by recursion, and an overflow would end the process


@dataclass(slots=True)
class Reader:
    """Writes one document anew. `gaps` are the keywords that the grammar will not know, in order."""

    where: str
    document: Document
    gaps: dict[str, None] = field(default_factory=dict)
    _names: dict[tuple[str, bool], str] = field(default_factory=dict)
    _defs: dict[str, JsonSchema] = field(default_factory=dict)
    _asked: list[tuple[str, Any, bool]] = field(default_factory=list)
    _has_anything: bool = False

    def whole(self, schema: object) -> JsonSchema:
        written = self.schema(schema, exact=False)
        while self._asked:  # not where they are referred to: a chain of references is no depth of the stack
            name, target, exact = self._asked.pop()
            self._defs[name] = self.schema(target, exact=exact)
        self._require_shallow(written)
        able = finite_definitions(self._defs)
        if not has_value(written, able):
            raise self._bad("<schema>", "no finite value is of it; look at required properties, items and references")
        written, defs = without_dead(written, able), {name: without_dead(self._defs[name], able) for name in able}
        if not defs or not isinstance(written, dict):
            return written  # type: ignore[no-any-return]
        return {**written, "$defs": {name: defs[name] for name in sorted(defs)}}

    def _require_shallow(self, written: JsonSchema) -> None:
        """However the definitions refer to each other, they cannot lead deeper than all of them together."""
        inner = [levels(body) for body in self._defs.values() if any("$ref" in node for node in nodes(body))]
        depth = levels(written) + sum(inner)
        if depth > _MOST_LEVELS:
            reason = f"references lead through up to {depth} levels, over {_MOST_LEVELS}; use fewer definitions"
            raise self._bad("<schema>", reason)

    def schema(self, schema: object, *, exact: bool) -> JsonSchema:
        """`schema`, written anew. `exact`: nothing may become narrower, for more is said about the same value."""
        if schema is True and not exact:
            return self._anything()
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._bad(type(schema).__name__, "a schema is an object, true or false")
        self._require_shape(schema)
        return self._object(plain(schema), exact)

    def _require_shape(self, schema: dict[str, Any]) -> None:
        names = schema.get("propertyNames")
        for said in (schema, names) if isinstance(names, dict) else (schema,):
            if wrong := misshapen(said):
                raise self._bad(*wrong)

    def _anything(self) -> JsonSchema:
        if not self._has_anything:
            self._has_anything = True
            self._defs.update(definitions(MOST_INTEGER))
        return ANYTHING

    def _object(self, schema: dict[str, Any], exact: bool) -> JsonSchema:
        self._refuse(schema)
        if not exact and not {"type", "const", "enum", "$ref", "allOf", "anyOf", "oneOf"} & set(schema):
            if not schema:
                return self._anything()
            schema = {"type": [*KINDS], **schema}
        if set(schema) == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1:
            return self.schema(schema["allOf"][0], exact=exact)
        composed = {"allOf", "anyOf", "oneOf", "$ref"} & set(schema)
        inner = exact or (bool(composed) and bool(set(schema) - composed - {"type"})) or len(composed) > 1
        written: dict[str, Any] = {}
        besides: list[JsonSchema] = []
        for key, value in schema.items():
            said = self._keyword(key, value, schema, exact, inner)
            if said.keys() & written.keys():
                besides.append(said)
            else:
                written.update(said)
        if besides:
            written["allOf"] = [*written.get("allOf", ()), *besides]
        kinds = kinds_of(schema)
        if not exact and not composed:
            self._narrow(schema, written)
            self._fill(written, kinds)
        self._count(written)
        if {"number", "integer"} & kinds and not FIXED & set(schema):
            written.update(bounds(schema))
            return written if exact or not written.keys() <= RANGE else self._shared(written)
        return written

    def _shared(self, written: dict[str, Any]) -> JsonSchema:
        """A range of numbers, defined once: for llguidance many that are alike cost far more than one."""
        name = self._names.setdefault((json.dumps(written, sort_keys=True), False), f"n{len(self._names)}")
        self._defs[name] = written
        return {"$ref": f"#/$defs/{name}"}

    def _keyword(self, key: str, value: Any, schema: dict[str, Any], exact: bool, inner: bool) -> dict[str, Any]:
        if key == "$ref":
            return {"$ref": f"#/$defs/{self._definition(value, inner)}"}
        if key in LISTS:
            return self._branches(key, value, inner)
        if key in MAPS and isinstance(value, dict):
            return {key: {name: self.schema(sub, exact=exact) for name, sub in value.items()}}
        if key == "items" and isinstance(value, list):  # as drafts before 2020-12 had it
            return self._tuple(value, schema.get("additionalItems"), exact)
        if key in SINGLES:
            return {key: self.schema(value, exact=exact)}
        if key == "format":
            return self._format(value, schema)
        if key == "pattern":
            return self._pattern(value)
        if key in GAPS:
            self._gap(key, value, schema)
        return self._value(key, value) if key in VALUES else {}

    def _value(self, key: str, value: Any) -> dict[str, Any]:
        if key in NUMBERS and isinstance(value, float) and value.is_integer():
            value = int(value)
        if key in NUMBERS and is_number(value) and abs(value) > MOST_INTEGER:
            self.gaps[f"{key} of more than 63 bits"] = None
            return {}
        return {key: value}

    def _branches(self, key: str, value: Any, inner: bool) -> dict[str, Any]:
        if not isinstance(value, list) or not value:
            raise self._bad(key, "it is a list of schemas, with one at least")
        if key == "oneOf" and (len(value) == 1 or told_apart(value, self.document)):
            key = "anyOf"
        # Branches of allOf hold together, and of oneOf no two may hold: neither may become narrower by itself.
        return {key: [self.schema(branch, exact=inner or key in ("allOf", "oneOf")) for branch in value]}

    def _tuple(self, items: list[Any], more: Any, exact: bool) -> dict[str, Any]:
        written: dict[str, Any] = {"prefixItems": [self.schema(item, exact=exact) for item in items]}
        return written if more is None else {**written, "items": self.schema(more, exact=exact)}

    def _format(self, value: Any, schema: dict[str, Any]) -> dict[str, Any]:
        kind = schema.get("type", "string")
        if "string" not in (kind if isinstance(kind, list) else [kind]):
            return {}  # formats of numbers say how wide they are stored
        if value in NATIVE:
            return {"format": value}
        if value not in PATTERNS:
            self.gaps[f"format: {value}"] = None
            return {}
        return {"pattern": PATTERNS[value]}

    def _pattern(self, value: Any) -> dict[str, Any]:
        if isinstance(value, str) and re.search(r"\(\?<?[=!]", value):
            if value in LOOKAHEADS:
                return {"pattern": LOOKAHEADS[value]}
            self.gaps["pattern (it looks around)"] = None
            return {}
        return {"pattern": ecma(value) if isinstance(value, str) else value}

    def _gap(self, key: str, value: Any, schema: dict[str, Any]) -> None:
        if key == "uniqueItems" and (value is False or schema.get("maxItems") in (0, 1)):
            return
        self.gaps[key] = None

    def _narrow(self, schema: dict[str, Any], written: dict[str, Any]) -> None:
        """Close objects that declare what they have."""
        properties = schema.get("properties", {})
        declares = "properties" in schema or "patternProperties" in schema
        silent = not {"additionalProperties", "unevaluatedProperties"} & set(schema)
        if (
            declares
            and silent
            and isinstance(properties, dict)
            and set(schema.get("required") or ()) <= set(properties)
        ):
            written["additionalProperties"] = False

    def _fill(self, written: dict[str, Any], kinds: set[Any]) -> None:
        """Say of the items and members of which nothing is said that they are anything."""
        if {"const", "enum"} & set(written):
            return
        if "array" in kinds and "items" not in written:
            written["items"] = self._anything()
        if "object" in kinds and "additionalProperties" not in written:
            written["additionalProperties"] = self._anything()

    def _count(self, written: dict[str, Any]) -> None:
        """A key that is not declared may stand twice, and then it counts once."""
        opens = written.get("additionalProperties", True) is not False or "patternProperties" in written
        if opens and written.get("minProperties", 0) > 1:
            self.gaps["minProperties of an object that may have undeclared ones"] = None

    def _refuse(self, schema: dict[str, Any]) -> None:
        for key, way_out in REFUSED.items():
            if key in schema:
                raise self._bad(key, f"it cannot be enforced; {way_out}")
        if schema.get("$id") not in (None, self.document.id) and self.document.references:
            raise self._bad("$id", "references across documents are not followed; use $defs and #/$defs/...")

    def _definition(self, reference: Any, exact: bool) -> str:
        """The name of the definition that stands for what `reference` means."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise self._bad(
                f"$ref: {reference}", "only references into the same schema are followed; put it under $defs"
            )
        key = (reference, exact)
        if key not in self._names:
            self._names[key] = name = f"d{len(self._names)}"
            target = self.document.pointed(reference)
            if not isinstance(target, dict | bool):
                raise self._bad(f"$ref: {reference}", "there is no schema at this place")
            self._asked.append((name, target, exact))
        return self._names[key]

    def _bad(self, value: object, reason: str) -> InvalidRequestError:
        return InvalidRequestError(self.where, value, reason)
