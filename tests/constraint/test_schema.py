"""Schemas of all sorts: enforced, checked afterwards, or refused by a typed error, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llama_worker import InvalidRequestError, ResponseFormat, ToolSpec
from llama_worker._constraint.grammar import grammar_of
from llama_worker._constraint.validation import Enforced, Validator
from llama_worker._errors import GenerationError
from tests.constraint.walks import (
    PLAIN,
    accepted,
    constraint,
    fits,
    json_constraint,
    reply,
    request,
)

_SLOWEST_S = 20.0  # of CPU, which others on the machine do not change; none takes 2 s, a hostile one would take hours
_MOST_MIB = 700


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Every schema here, whatever it is, costs bounded time and memory."""
    before, started = _peak_mib(), time.process_time()
    yield
    assert time.process_time() - started < _SLOWEST_S
    assert _peak_mib() - before < _MOST_MIB


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def nested(depth: int, wrap: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema} if wrap == "items" else {"anyOf": [schema, {"type": "null"}]}
    return schema


def doubling(n: int) -> dict[str, Any]:
    """A schema that grows to 2**n when its references are put in their places."""
    defs: dict[str, Any] = {"a0": {"type": "string"}}
    for i in range(1, n):
        before = {"$ref": f"#/$defs/a{i - 1}"}
        other = {"anyOf": [{"type": "string", "minLength": i}, {"type": "integer"}]}
        defs[f"a{i}"] = {"anyOf": [{"allOf": [before, other]}, before]}
    return {"$ref": f"#/$defs/a{n - 1}", "$defs": defs}


def endless() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


def wide(depth: int) -> Any:
    """A few objects that refer to each other so that they are 2**depth when written out."""
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = {"anyOf": [value, value]}
    return value


REFUSED: dict[str, tuple[Any, str]] = {
    "not": ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
    "a remote reference": ({"$ref": "https://example.org/schema.json"}, "https://example.org/schema.json"),
    "a reference to itself": ({"$ref": "#"}, "finite"),
    "references in a circle": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "finite",
    ),
    "a reference to nothing": ({"$ref": "#/$defs/missing"}, "no schema at this place"),
    "an endless value": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "finite"),
    "1 MB of enum": ({"enum": [f"value {i:030d}" for i in range(30_000)]}, "characters"),
    "an empty enum": ({"enum": []}, "enforced"),
    "minimum over maximum": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "minLength over maxLength": ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
    "minItems over maxItems": ({"type": "array", "minItems": 5, "maxItems": 3}, "minItems"),
    "a contradicting const": ({"const": 1, "type": "string"}, "incompatible"),
    "contradicting constants": ({"allOf": [{"const": "a"}, {"const": "b"}]}, "enforced"),
    "a required property that cannot be": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "finite"),
    "false": (False, "finite"),
    "deep nesting": (nested(200), "levels"),
    "itself inside": (endless(), "levels"),
    "2**60 values in 60 objects": (wide(60), "values"),
    "a type that is none": ({"type": "strnig"}, "strnig"),
    "a schema that is a number": ({"properties": {"a": 3}}, "true or false"),
    "a set": ({"enum": {1, 2}}, "JSON"),
    "a number that is none": ({"minimum": float("nan")}, "JSON"),
    "half a character": ({"const": "\ud800"}, "JSON"),
    "100,000 numbers": ({"enum": list(range(100_000))}, ""),
    "all of many any-ofs": (
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": k}}} for k in range(4)]} for i in range(8)]},
        "",
    ),
    "references that double": (doubling(40), "too large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_or_hostile_schema_is_a_typed_error(name: str) -> None:
    schema, said = REFUSED[name]
    tool = ToolSpec.model_construct(
        name="t", parameters={"type": "object", "properties": {"p": schema}, "required": ["p"]}, strict=None
    )
    for asked, where in (
        (
            request().model_copy(
                update={
                    "response_format": ResponseFormat.model_construct(
                        type="json_schema", json_schema=schema, strict=None
                    )
                }
            ),
            "response_format.json_schema",
        ),
        (request().model_copy(update={"tools": (tool,), "tool_choice": "required"}), "tools.t.parameters"),
    ):
        if where.startswith("tools") and isinstance(schema, dict) and "#" in str(schema.get("$ref", "")):
            continue  # there its references would mean another place
        with pytest.raises(InvalidRequestError) as info:
            constraint(asked)
        assert info.value.field == where
        assert said in str(info.value) or where.startswith("tools")
        assert len(str(info.value)) < 600


WORKING: dict[str, tuple[Any, str, str]] = {
    "recursive": (
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "v": {"type": "integer"},
                        "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["v"],
                }
            },
        },
        '{"v": 1, "kids": [{"v": 2}, {"v": 3, "kids": []}]}',
        '{"v": 1, "kids": [{"x": 2}]}',
    ),
    "recursive at the root": (
        {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
        '{"next": {"next": null}}',
        '{"next": 1}',
    ),
    "an optional property that cannot be": (
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        "{}",
        '{"a": 1}',
    ),
    "a description of 10,000 characters": ({"type": "integer", "description": "x" * 10_000}, "12", '"x"'),
    "300 kB of descriptions": (
        {"type": "object", "properties": {f"p{i}": {"type": "integer", "description": "x" * 3000} for i in range(100)}},
        '{"p7": 1, "p99": 2}',
        '{"p7": "x"}',
    ),
    "50 levels": (nested(45), "[" * 45 + '"x"' + "]" * 45, "[" * 44 + '"x"' + "]" * 44),
    "const and enum": ({"enum": ["a", 1, None, {"b": [True]}]}, '{"b": [true]}', '{"b": [false]}'),
    "a date that was": ({"type": "string", "format": "date"}, '"2024-02-29"', '"2023-02-29"'),
    "a time without a leap second": ({"type": "string", "format": "time"}, '"23:59:59Z"', '"23:59:60Z"'),
    "a format beside a pattern": (
        {"type": "string", "format": "date", "pattern": "^2024"},
        '"2024-02-29"',
        '"2023-02-28"',
    ),
    "a union told by a constant": (
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "$defs": {
                name: {
                    "type": "object",
                    "properties": {"kind": {"const": name}, key: {"type": "integer"}},
                    "required": ["kind", key],
                }
                for name, key in (("cat", "lives"), ("dog", "age"))
            },
        },
        '{"kind": "dog", "age": 3}',
        '{"kind": "dog", "lives": 3}',
    ),
    "references anywhere": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}},
            "required": ["b"],
        },
        '{"b": 3}',
        '{"b": "x"}',
    ),
    "definitions of OpenAPI": (
        {"$ref": "#/components/schemas/A", "components": {"schemas": {"A": {"type": "string", "maxLength": 2}}}},
        '"ab"',
        '"abc"',
    ),
    "properties that are named like keywords": (
        {
            "type": "object",
            "properties": {"not": {"type": "integer"}, "format": {"const": "x"}, "$ref": {"type": "null"}},
        },
        '{"not": 1, "format": "x", "$ref": null}',
        '{"not": "a"}',
    ),
    "tuples as drafts before had them": (
        {"type": "array", "items": [{"type": "integer"}, {"type": "string"}], "additionalItems": False, "minItems": 2},
        '[1, "a"]',
        '[1, "a", 2]',
    ),
    "an integer without bounds": ({"type": "integer"}, "9000000000000000000", "9" * 30),
}


@pytest.mark.parametrize("name", WORKING)
def test_schema_is_enforced(name: str) -> None:
    schema, right, wrong = WORKING[name]
    assert accepted(json_constraint(schema, strict=True), right) == len(right)
    assert not fits(json_constraint(schema, strict=True), wrong)
    assert isinstance(json_constraint(schema).checks.answer, Enforced)


def test_object_that_declares_its_properties_has_no_others() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert not fits(json_constraint(schema), '{"b": 1}')
    assert fits(json_constraint({**schema, "additionalProperties": True}), '{"b": 1}')


def test_objects_that_hold_together_are_not_closed_one_by_one() -> None:
    parts = [{"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab"]
    assert fits(json_constraint({"allOf": parts}, strict=True), '{"a": 1, "b": 2}')


GAPS: dict[str, Any] = {
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3, "uniqueItems": True},
    "format: binary": {"type": "string", "format": "binary"},
    "if": {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "pattern": {"type": "string", "pattern": "^(?!a).*$"},
}


@pytest.mark.parametrize("keyword", GAPS)
def test_what_cannot_be_enforced_is_checked_or_with_strict_refused(keyword: str) -> None:
    assert isinstance(json_constraint(GAPS[keyword]).checks.answer, Validator)
    with pytest.raises(InvalidRequestError) as info:
        json_constraint(GAPS[keyword], strict=True)
    assert info.value.field == "response_format.json_schema"
    assert keyword in str(info.value)
    assert "strict" in str(info.value)


def test_check_says_where_and_why_but_not_what() -> None:
    made = json_constraint({"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}})
    assert made.checks.text('{"tags": ["a", "b"]}') is None
    said = made.checks.text('{"tags": ["secret", "secret"]}')
    assert said is not None
    assert "tags" in said
    assert "uniqueItems" in said
    assert "secret" not in said


def test_schema_that_the_validator_does_not_take_is_a_typed_error() -> None:
    with pytest.raises(InvalidRequestError) as info:
        json_constraint({"type": "array", "uniqueItems": "yes"})
    assert info.value.field == "response_format.json_schema"


PARAMETERS: dict[str, tuple[Any, str]] = {
    "none": ({}, "{}"),
    "none declared": ({"type": "object", "properties": {}}, "{}"),
    "none required": ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": 1}'),
    "no type": ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a": 1}'),
    "a reference": (
        {
            "$ref": "#/$defs/A",
            "$defs": {"A": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}},
        },
        '{"a": null}',
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_a_tool_are_those_of_an_object(name: str) -> None:
    parameters, arguments = PARAMETERS[name]
    tool = ToolSpec(name="t", parameters=parameters)
    call = f'<tool_call>\n{{"name": "t", "arguments": {arguments}}}\n</tool_call>'
    assert fits(constraint(request(tools=(tool,), tool_choice="required")), call)
    assert not fits(constraint(request(tools=(tool,), tool_choice="required")), call.replace(arguments, '{"b": 1}'))
    assert not fits(constraint(request(tools=(tool,), tool_choice="required")), call.replace(arguments, "[]"))


@pytest.mark.parametrize(
    "parameters", [{"type": "string"}, {"type": ["array", "null"]}, {"type": "integer", "minimum": 1}]
)
def test_parameters_that_are_no_object_are_refused(parameters: dict[str, Any]) -> None:
    asked = request(tools=(ToolSpec(name="t", parameters=parameters),))
    with pytest.raises(InvalidRequestError) as info:
        grammar_of(asked, PLAIN, in_reasoning=False)
    assert info.value.field == "tools.t.parameters"


def test_strict_tool_with_a_keyword_that_cannot_be_enforced_names_the_tool() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(InvalidRequestError) as info:
        constraint(request(tools=(ToolSpec(name="sort", parameters=parameters, strict=True),)))
    assert info.value.field == "tools.sort.parameters"


def test_left_recursive_gbnf_works() -> None:
    grammar = 'root ::= sum\nsum ::= sum "+" num | num\nnum ::= [0-9]+\n'
    made = lambda: constraint(request(response_format=ResponseFormat(type="gbnf", grammar=grammar)))  # noqa: E731
    assert fits(made(), "1+22+333")
    assert not fits(made(), "1+")


GRAMMARS = {
    "lark": ('start: "a" b\nb: /[0-9]{2}/\n', "a12", "a1"),
    "gbnf": ('root ::= "[" item ("," item)* "]"\nitem ::= [a-c]+\n', "[a,bc]", "[d]"),
    "regex": ("^[a-z]+/[0-9]{2,3}$", "ab/123", "ab/1"),
}


@pytest.mark.parametrize("kind", GRAMMARS)
def test_grammars_of_the_caller_are_enforced(kind: str) -> None:
    grammar, right, wrong = GRAMMARS[kind]
    given = {"regex": grammar} if kind == "regex" else {"grammar": grammar}
    made = lambda: constraint(request(response_format=ResponseFormat(type=kind, **given)))  # type: ignore[arg-type]  # noqa: E731
    assert fits(made(), right)
    assert not fits(made(), wrong)


HOSTILE_GRAMMARS = {
    "groups in groups": ("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "endless": ("gbnf", "root ::= root root\n"),
    "a rule that is not there": ("gbnf", "root ::= missing\n"),
    "half an escape": ("gbnf", 'root ::= "a\\'),
    "no rule": ("gbnf", ""),
    "nothing": ("lark", ""),
    "too long": ("lark", "start: " + "x" * 300_000),
    "a state for each of 2**25": ("regex", "(a|b)*a(a|b){25}c(d|(e|f)*e(e|f){25})*(?:x{1000}){1000}"),
    "looking ahead": ("regex", "(?=a)b"),
    "an open bracket": ("regex", "[a"),
    "too long a regex": ("regex", "a" * 300_000),
}


@pytest.mark.parametrize("name", HOSTILE_GRAMMARS)
def test_hostile_grammar_is_bounded_and_typed(name: str) -> None:
    kind, grammar = HOSTILE_GRAMMARS[name]
    given = {"regex": grammar} if kind == "regex" else {"grammar": grammar}
    try:
        reply(constraint(request(response_format=ResponseFormat(type=kind, **given))), 1, most=300)  # type: ignore[arg-type]
    except (InvalidRequestError, GenerationError) as exc:
        field, said = getattr(exc, "field", None), str(exc)
    else:
        return
    assert field in (None, f"response_format.{next(iter(given))}")
    assert len(said) < 600


def test_choice_is_one_of_these() -> None:
    for seed in range(10):
        made = constraint(request(response_format=ResponseFormat(type="choice", choices=("yes", "no", "yes, but"))))
        assert reply(made, seed) in ("yes", "no", "yes, but")


def test_json_object_is_an_object() -> None:
    made = constraint(request(response_format=ResponseFormat(type="json_object")))
    assert isinstance(json.loads(reply(made, 3) or "{}"), dict)


def test_many_tools_are_bounded() -> None:
    properties = {f"p{i}": {"type": ("string", "integer", "boolean")[i % 3]} for i in range(6)}
    tools = [ToolSpec(name=f"t{i}", parameters={"type": "object", "properties": properties}) for i in range(129)]
    call = '<tool_call>\n{"name": "t127", "arguments": {"p1": 3}}\n</tool_call>'
    assert fits(constraint(request(tools=tools[:128], tool_choice="required")), call)
    with pytest.raises(InvalidRequestError) as info:
        constraint(request(tools=tools))
    assert info.value.field == "tools"
    assert "129" in str(info.value)


def test_checking_a_value_as_deep_as_a_model_may_nest_it_is_bounded() -> None:
    made = json_constraint({"type": "array", "uniqueItems": True})
    assert made.checks.text("[" * 150 + "]" * 150) is None
    for depth in (900, 100_000):
        assert made.checks.text("[" * depth + "]" * depth) is not None
