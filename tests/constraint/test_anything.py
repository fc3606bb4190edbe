"""Where a schema says nothing of a value, a call that must be made is valid all the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llama_worker import ToolSpec
from llama_worker._constraint.anything import DEEPEST
from llama_worker._events import InvalidToolCall
from tests.chat.formats import SYNTAXES, format_with
from tests.chat.parsing import ended, parser, run
from tests.constraint.walks import PROOF, VOCABULARY, accepted, constraint, fits, json_constraint, reply, request

OPEN: dict[str, dict[str, Any]] = {
    "a parameter of any kind": {"properties": {"p": {}}, "required": ["p"]},
    "one that is said to be true": {"properties": {"p": True}, "required": ["p"]},
    "one of which only a title is said": {"properties": {"p": {"title": "P"}}, "required": ["p"]},
    "one with no type": {"properties": {"p": {"minLength": 2}}, "required": ["p"]},
    "a list of anything": {"properties": {"p": {"type": "array"}}, "required": ["p"]},
    "an object of anything": {"properties": {"p": {"type": "object"}}, "required": ["p"]},
    "anything at all": {"additionalProperties": True},
    "more beside what is declared": {"properties": {"p": {"type": "string"}}, "additionalProperties": True},
    "more of one kind": {"properties": {"p": {"type": "string"}}, "additionalProperties": {"type": "number"}},
    "a definition that says nothing": {
        "properties": {"p": {"$ref": "#/$defs/Any"}},
        "required": ["p"],
        "$defs": {"Any": {}},
    },
}
SEEDS = range(20 if PROOF else 3)


def likes(*bytes_: str) -> NDArray[np.float64]:
    """The weights of a model that would always like to say one of these."""
    weights = np.full(len(VOCABULARY.pieces), 0.5)
    weights[[*b'"}],: ', *range(256, len(weights))]] = 10.0
    weights[[*"".join(bytes_).encode()]] = 30.0
    return weights


WISHES = {"digits": likes("0123456789eE+"), "levels": likes("[{"), "few keys": likes('a",:{')}


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("schema", OPEN)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_call_that_must_be_made_is_valid_whatever_the_model_likes_to_say(syntax: str, schema: str, wish: str) -> None:
    tool = ToolSpec(name="t", parameters={"type": "object", **OPEN[schema]})
    asked = request(tools=(tool,), tool_choice="required")
    format = replace(format_with(SYNTAXES[syntax]), reasoning=None)
    for seed in SEEDS:
        made = constraint(asked, format)
        said = reply(made, seed, most=600, weights=WISHES[wish])
        if said is None:  # it has not come to an end: no call
            continue
        (call,) = ended(run(parser(format, tools=(tool,)), [said]))
        assert not isinstance(call, InvalidToolCall), (call.error, said)
        assert made.checks.call("t", call.arguments) is None


@pytest.mark.parametrize("schema", [{}, True, {"title": "Any"}, {"type": ["array", "object"]}, {"minLength": 1}])
def test_value_of_any_kind_has_so_many_levels_and_only_finite_numbers(schema: Any) -> None:
    whole = {"type": "object", "properties": {"p": schema}, "required": ["p"]}
    start = '{"p": '
    most = DEEPEST + ("minLength" in str(schema) or "type" in str(schema))
    for opened, closed in (("[", "]"), ('{"a": ', "}")):
        deep = opened * most + opened.strip('"a: ') + closed.strip() * (most + 1)
        assert fits(json_constraint(whole), start + opened * (most - 1) + "[]" + closed * (most - 1) + "}")
        assert accepted(json_constraint(whole), start + deep) <= len(start + opened * most)
    for number in ("1e999", "9" * 30, "-" + "9" * 30, "1E5"):
        at = accepted(json_constraint(whole), f"{start}[{number}]")
        assert at < len(start) + 1 + len(number), number
    assert fits(json_constraint(whole), start + '[-1.25, "x", null, {"y": [true]}]}')


def test_any_object_is_one_that_can_be_read_again() -> None:
    asked = request(response_format={"type": "json_object"})
    assert fits(constraint(asked), '{"a": [1.5, {"b": null}]}')
    assert not fits(constraint(asked), '{"a": 1e999}')


def test_of_a_key_that_stands_twice_the_last_one_counts() -> None:
    """A grammar cannot forbid it where any key may stand, and whoever reads the pieces takes the last one, too."""
    tool = ToolSpec(name="t", parameters={"type": "object", "additionalProperties": {"type": "integer"}})
    format = format_with(SYNTAXES["hermes"])
    said = '<tool_call>\n{"name": "t", "arguments": {"a": 1, "b": 2, "a": 3}}\n</tool_call>'
    made = constraint(request(tools=(tool,), tool_choice="required"), format)
    assert fits(made, said)
    (call,) = ended(run(parser(format, tools=(tool,)), [said]))
    assert call.arguments == {"a": 3, "b": 2}
    assert json.loads('{"a": 1, "b": 2, "a": 3}') == call.arguments
    assert made.checks.call("t", call.arguments) is None
    assert "integer" in str(made.checks.call("t", {"a": "x"})) or made.checks.call("t", {"a": "x"})


def test_keys_that_may_stand_twice_are_counted_when_the_value_is_whole() -> None:
    made = json_constraint({"type": "object", "minProperties": 2})
    assert fits(made, '{"a": 1, "a": 2}')
    assert made.checks.text('{"a": 1, "a": 2}') is not None
    assert made.checks.text('{"a": 1, "b": 2}') is None
