"""Reading a JSON schema: what of it a grammar can enforce, what must be checked afterwards, and what is refused.

The schema that is compiled is written anew. Annotations are left out, local references become definitions at the
root, exact formats become patterns, and some things become narrower than the caller said, because a model that may
say anything does: an object that declares `properties` and is silent about others has no others, a number without
bounds has at most 63 bits before the point, so that it is neither endless nor infinite, and a value of which nothing
is said has so many levels and no more (`anything.py`). What the grammar allows is always allowed by the caller's
schema, unless a keyword is one of the `gaps`; then the finished value is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llama_worker._constraint.places import mapped
from llama_worker._constraint.plain_json import json_text
from llama_worker._constraint.reader import JsonSchema, Reader
from llama_worker._constraint.references import Document
from llama_worker._constraint.rules import Schema
from llama_worker._errors import InvalidRequestError

_MOST_BYTES: Final = 256 << 10
_CHECKED_LATER: Final = frozenset(
    {"pattern", "format", "multipleOf", "minProperties", "maxProperties", "patternProperties"}
)


def read_schema(schema: object, where: str, *, strict: bool, root: Document | None = None) -> Schema:
    """A schema as it can be compiled. `root` is the document that its references mean, if that is another.

    Raises InvalidRequestError with the field `where`: for what is no schema, out of bounds, remote, impossible or,
    with `strict`, not to be enforced whole.
    """
    try:
        return _read(schema, where, strict, root)
    except RecursionError:  # the caller's own stack is nearly full
        raise InvalidRequestError(where, "<schema>", "nested too deeply for the stack that is left") from None


def _read(schema: object, where: str, strict: bool, root: Document | None) -> Schema:
    original = json_text(schema, where)
    reader = Reader(where, root or Document(json.loads(original)))
    exact = reader.whole(json.loads(original))
    if strict and reader.gaps:
        raise InvalidRequestError(
            where,
            next(iter(reader.gaps)),
            "it cannot be enforced; leave it out, or leave strict out to have it checked",
        )
    return Schema(
        field=where,
        strict=strict,
        original=original,
        exact=_bounded(exact, where),
        loose=_bounded(_loosened(exact), where),
        gaps=tuple(reader.gaps),
    )


def arguments_schema(parameters: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The schema of a tool's arguments: an object. {} means that there are none.

    Raises InvalidRequestError for the schema of anything else.
    """
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = {"type": "object", **parameters}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if "object" not in types:
        raise InvalidRequestError(where, schema["type"], 'arguments are an object; use {"type": "object", ...}')
    return {**schema, "type": "object"}


def _loosened(schema: Any) -> Any:
    """Without what llguidance may choke on."""
    if not isinstance(schema, dict):
        return schema
    dropped = _CHECKED_LATER | ({"additionalProperties"} if "patternProperties" in schema else set())
    return mapped({key: value for key, value in schema.items() if key not in dropped}, _loosened)


def _bounded(schema: JsonSchema, where: str) -> str:
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > _MOST_BYTES:
        raise InvalidRequestError(
            where, f"<{len(text)} characters>", f"over {_MOST_BYTES} without descriptions; make it shorter"
        )
    return text
