"""Which parameters are text: those that can be nothing but a string, whatever way the schema says so."""

from __future__ import annotations

from typing import Any

import pytest

from llama_worker._chat.parameters import nullable_parameters, text_parameters
from llama_worker._requests import ToolSpec

DEFS = {
    "word": {"type": "string", "minLength": 1},
    "color": {"enum": ["red", "green"]},
    "loop": {"$ref": "#/$defs/loop"},
    "list": [{"type": "string"}],
    "a/b~c d": {"type": "string"},
    "tree": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/tree"}]},
}


def tool(schema: Any) -> ToolSpec:
    return ToolSpec(name="f", parameters={"type": "object", "properties": {"x": schema}, "$defs": DEFS})


@pytest.mark.parametrize(
    ("schema", "text", "nullable"),
    [
        ({"type": "string"}, True, False),
        ({"type": ["string"]}, True, False),
        ({"type": ["string", "null"]}, True, True),
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, True, True),
        ({"oneOf": [{"type": "string", "format": "date"}, {"const": "never"}]}, True, False),
        ({"allOf": [{"$ref": "#/$defs/word"}], "description": "a word"}, True, False),
        ({"$ref": "#/$defs/word"}, True, False),
        ({"$ref": "#/$defs/a~1b~0c%20d"}, True, False),
        ({"$ref": "#/$defs/list/0"}, True, False),
        ({"enum": ["a", "b"]}, True, False),
        ({"enum": ["a", None]}, True, True),
        ({"const": "a"}, True, False),
        ({"$ref": "#/$defs/color"}, True, False),
        ({"type": ["string", "integer"], "enum": ["a"]}, True, False),
        ({"type": "integer"}, False, False),
        ({"type": "null"}, False, False),
        ({"type": ["string", "integer"]}, False, False),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, False, False),
        ({"enum": ["a", 1]}, False, False),
        ({"type": "array", "items": {"type": "string"}}, False, False),
        ({}, False, False),
        (True, False, False),
        ({"$ref": "#/$defs/nothing"}, False, False),
        ({"$ref": "#/$defs/list/7"}, False, False),
        ({"$ref": "https://example.com/s.json"}, False, False),
        ({"$ref": "#/$defs/loop"}, False, False),
        ({"$ref": "#/$defs/tree"}, False, False),
        ({"type": "string", "anyOf": "nonsense", "allOf": 3, "enum": 5}, True, False),
        ({"type": [["string"], 3]}, False, False),
    ],
)
def test_what_is_text(schema: Any, text: bool, nullable: bool) -> None:
    assert text_parameters(tool(schema)) == ({"x"} if text else set())
    assert nullable_parameters(tool(schema)) == ({"x"} if nullable else set())


@pytest.mark.parametrize("parameters", [{}, {"type": "object"}, {"properties": None}, {"properties": ["x"]}])
def test_a_schema_without_properties_has_none(parameters: dict[str, Any]) -> None:
    assert text_parameters(ToolSpec(name="f", parameters=parameters)) == frozenset()
