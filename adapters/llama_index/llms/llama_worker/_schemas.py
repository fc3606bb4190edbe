"""What a class demands of the JSON that becomes an object of it. All pure."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

if TYPE_CHECKING:
    from pydantic_core import core_schema


class _Demands(GenerateJsonSchema):
    """Of a set an element may be told twice: pydantic makes one of it, and no grammar could tell the two apart.

    What else of the schema says `uniqueItems` was written by somebody who means it, and stays.
    """

    def set_schema(self, schema: core_schema.SetSchema) -> dict[str, Any]:
        return _without_uniqueness(super().set_schema(schema))

    def frozenset_schema(self, schema: core_schema.FrozenSetSchema) -> dict[str, Any]:
        return _without_uniqueness(super().frozenset_schema(schema))


def _without_uniqueness(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "uniqueItems"}


def demanded(cls: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a class, without what its own validation mends. A class that describes itself is believed."""
    known = signature(cls.model_json_schema).parameters
    if "schema_generator" in known or any(known[name].kind == Parameter.VAR_KEYWORD for name in known):
        return cls.model_json_schema(schema_generator=_Demands)
    return cls.model_json_schema()
