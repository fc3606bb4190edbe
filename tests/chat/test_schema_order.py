"""The same tool is the same tokens, in whatever order its keys were written down."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llama_worker import LlamaWorker, Message
from llama_worker._chat.schema_order import in_order
from llama_worker._requests import ToolSpec
from llama_worker.testing import fake_worker

SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "Where and when.",
    "properties": {
        "reason": {"type": "string", "description": "Why.", "maxLength": 80},
        "town": {"$ref": "#/$defs/Town"},
        "at": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
        "options": {"type": "object", "default": {"b": 1, "a": {"z": 1, "y": 2}}, "additionalProperties": False},
    },
    "required": ["reason", "town"],
    "$defs": {"Town": {"type": "string", "enum": ["Oban", "Mull"]}, "Country": {"const": {"y": 1, "x": 2}}},
}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
)
ASKED = [Message(role="user", content="?")]


def shuffled(value: Any, rng: random.Random, *, names: bool = False) -> Any:
    """The same JSON, its keys in another order, but for the names of properties."""
    if isinstance(value, dict):
        keys = list(value)
        if not names:
            rng.shuffle(keys)
        return {key: shuffled(value[key], rng, names=key == "properties") for key in keys}
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def worker():
    with fake_worker(chat_template=TEMPLATE) as worker:
        yield worker


def prompt(worker: LlamaWorker, *tools: Any) -> str:
    return worker._view().rendered(ASKED, [tool if isinstance(tool, ToolSpec) else ToolSpec(**tool) for tool in tools])


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_keys_changes_no_token(worker: LlamaWorker, seed: int):
    rng = random.Random(seed)
    tool = {"name": "weather", "description": "The weather.", "parameters": SCHEMA}
    other = shuffled(tool, rng)
    assert prompt(worker, other) == prompt(worker, tool)
    openai = shuffled({"type": "function", "function": tool}, rng)
    assert prompt(worker, openai) == prompt(worker, tool)


def test_it_reads_as_most_tools_do():
    ordered = in_order(SCHEMA)
    assert ordered == SCHEMA
    assert list(ordered) == ["type", "description", "properties", "required", "$defs"]
    assert list(ordered["properties"]["reason"]) == ["type", "description", "maxLength"]
    assert list(ordered["$defs"]) == ["Country", "Town"]


def test_what_has_an_order_keeps_it(worker: LlamaWorker):
    """Arguments are written in the order of the properties, tools stand in that of their list."""
    assert list(in_order(SCHEMA)["properties"]) == ["reason", "town", "at", "options"]
    assert in_order(SCHEMA)["required"] == ["reason", "town"]
    one, two = ({"name": name, "parameters": {}} for name in ("one", "two"))
    assert prompt(worker, one, two) != prompt(worker, two, one)


def test_a_property_may_be_named_like_a_keyword():
    schema = {"properties": {"type": {"type": "string"}, "properties": {"description": "b", "type": "object"}}}
    assert list(in_order(schema)["properties"]) == ["type", "properties"]
    assert list(in_order(schema)["properties"]["properties"]) == ["type", "description"]


def test_what_is_no_schema_comes_through():
    for odd in (True, [], [{"b": 1, "a": 2}], {"properties": None, "$defs": [1]}, {"required": "x"}):
        assert in_order(odd) == odd
