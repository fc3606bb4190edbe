"""Calls and answers that are both JSON and begin alike, as one schema: no lexer could tell them apart."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from llama_worker._chat.calls import name_in
from llama_worker._chat.format import CallSyntax, Slot
from llama_worker._constraint.places import mapped
from llama_worker._constraint.rules import Schema
from llama_worker._errors import InvalidRequestError

_ARGUMENTS: Final = "\ue000arguments"
_ID: Final = "\ue000id"
_WAY_OUT: Final = (
    "with tools, this model's calls and such a text could not be told apart; leave one of them out, or ask for an "
    "object without further properties, of which none is named like the first one of a call"
)


def begins_as_json(syntax: CallSyntax) -> bool:
    """Whether the calls begin with what an answer in JSON may begin with."""
    return syntax.trigger.lstrip().startswith(("{", "[", '"'))


def union_schema(syntax: CallSyntax, tools: Mapping[str, Schema], answer: Schema) -> Schema:
    """The schema of a call of one of `tools`, by name, or of an answer.

    Raises InvalidRequestError where the answer could begin as a call does, or the calls are no JSON by themselves.
    """
    key = re.match(r'\s*\{"([^"\\]*)"', syntax.trigger)
    if key is None or not _never_has(json.loads(answer.exact), key[1]):
        raise InvalidRequestError(answer.field, "<schema>", _WAY_OUT)
    calls = [_call(syntax, name, answer.field) for name in tools]
    everything = (answer, *tools.values())
    return Schema(
        field=answer.field,
        strict=any(schema.strict for schema in everything),
        original=answer.original,
        exact=_union(calls, [json.loads(schema.exact) for schema in everything]),
        loose=_union(calls, [json.loads(schema.loose) for schema in everything]),
        gaps=tuple(dict.fromkeys(gap for schema in everything for gap in schema.gaps)),
    )


def _never_has(schema: Any, key: str) -> bool:
    """Whether all values are objects that cannot have `key`."""
    if isinstance(schema, dict) and "$ref" in schema:
        schema = schema["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    closed = isinstance(schema, dict) and schema.get("type") == "object" and schema.get("additionalProperties") is False
    return closed and key not in schema.get("properties", {}) and "patternProperties" not in schema


def _call(syntax: CallSyntax, name: str, field: str) -> Any:
    """The JSON value that a call is, with _ARGUMENTS and _ID in it."""
    words = {Slot.NAME: name_in(syntax, name), Slot.ID: _ID, Slot.ARGUMENTS: json.dumps(_ARGUMENTS, ensure_ascii=False)}
    parts = (syntax.section_open, *syntax.call, syntax.section_close)
    text = "".join(part if isinstance(part, str) else words.get(part, "") for part in parts)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if syntax.arguments != "json" or json.dumps(value, ensure_ascii=False) != text:
        raise InvalidRequestError(field, "<schema>", _WAY_OUT)
    return value


def _union(calls: list[Any], documents: list[Any]) -> str:
    """`documents`: the answer, then the arguments of each of `calls`. Each keeps its own definitions in itself."""
    defs = {f"u{index}": _moved(document, f"#/$defs/u{index}/") for index, document in enumerate(documents)}
    options = [_only(call, f"#/$defs/u{index}") for index, call in enumerate(calls, 1)]
    return json.dumps({"anyOf": [*options, {"$ref": "#/$defs/u0"}], "$defs": defs}, ensure_ascii=False)


def _only(value: Any, arguments: str) -> dict[str, Any]:
    """The schema of `value` alone, but for what stands for the arguments and for an id."""
    if value == _ARGUMENTS:
        return {"$ref": arguments}
    if value == _ID:
        return {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,64}$"}
    if isinstance(value, dict):
        properties = {key: _only(part, arguments) for key, part in value.items()}
        return {"type": "object", "properties": properties, "required": [*value], "additionalProperties": False}
    if isinstance(value, list):
        items = [_only(part, arguments) for part in value]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    return {"const": value}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references are to definitions at its root, standing in another at `place`."""
    if not isinstance(schema, dict):
        return schema
    moved = mapped(schema, lambda part: _moved(part, place))
    if "$ref" in moved:
        moved["$ref"] = place + moved["$ref"].removeprefix("#/")
    return moved
