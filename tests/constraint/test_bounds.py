"""What a caller may give is read and checked in bounded work, and what is of no use is a typed error."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from llama_worker import InvalidRequestError, ResponseFormat, ToolSpec
from llama_worker._chat.format import Tagged
from llama_worker._constraint.compiler import ConstraintCompiler
from llama_worker._constraint.effort import is_costly
from llama_worker._constraint.finite import finite_definitions
from llama_worker._constraint.grammar import grammar_of
from llama_worker._constraint.references import Document
from llama_worker._constraint.schema import read_schema
from llama_worker._constraint.tagged import TaggedArguments
from llama_worker._constraint.validation import Validator
from llama_worker._errors import GenerationError
from tests.constraint.walks import PLAIN, VOCABULARY, constraint, fits, json_constraint, request


def chain(n: int, leaf: Any, twice: bool = False) -> dict[str, Any]:
    """D0 is D1, which is D2, and so on; or with `twice` each is the next one and the next one."""
    refs = [{"$ref": f"#/$defs/D{i + 1}"} for i in range(n)]
    defs: dict[str, Any] = {f"D{i}": {"allOf": [ref, ref]} if twice else ref for i, ref in enumerate(refs)}
    return {"$ref": "#/$defs/D0", "$defs": {**defs, f"D{n}": leaf}}


def calls_in(run: Callable[[], object]) -> Counter[str]:
    """How often each Python function is called in it."""
    seen: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


MISSHAPEN: dict[str, dict[str, Any]] = {
    "type in a list in a list": {"type": [["string"]]},
    "format in a list": {"type": "string", "format": ["x"]},
    "format of names in a list": {"type": "object", "propertyNames": {"format": ["x"]}},
    "pattern of names in a list": {"type": "object", "propertyNames": {"pattern": ["x"]}},
    "required objects": {"type": "object", "required": [{}], "properties": {"a": {}}},
    "required as draft 3 had it": {"type": "object", "properties": {"a": {"required": True}}},
    "a constant told by a list": {
        "oneOf": [{"type": "object", "properties": {"k": {"const": kind}}, "required": [["k"]]} for kind in ("a", "b")]
    },
    "minItems in words": {"type": "array", "minItems": "three"},
    "properties in a list": {"type": "object", "properties": ["a"]},
    "a reference to a number": {"$ref": 3},
    "an enum in words": {"enum": "a or b"},
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_keyword_with_a_value_of_the_wrong_kind_is_a_typed_error(name: str) -> None:
    with pytest.raises(InvalidRequestError) as info:
        json_constraint(MISSHAPEN[name])
    assert info.value.field == "response_format.json_schema"
    parameters = {"type": "object", "properties": {"p": MISSHAPEN[name]}, "required": ["p"]}
    with pytest.raises(InvalidRequestError) as info:
        constraint(request(tools=(ToolSpec(name="t", parameters=parameters),), tool_choice="required"))
    assert info.value.field == "tools.t.parameters"


@pytest.mark.parametrize(
    "asked", [{"type": "regex", "regex": "\ud800"}, {"type": "choice", "choices": ("a", "\udfff")}]
)
def test_half_a_character_is_a_typed_error(asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as info:
        constraint(request(response_format=ResponseFormat(**asked)))
    assert info.value.field.startswith("response_format.")


def test_chain_of_references_is_followed_however_full_the_stack_is() -> None:
    def beneath(depth: int) -> bool:
        return beneath(depth - 1) if depth else fits(json_constraint(chain(300, {"type": "null"})), "null")

    assert beneath(400)


def test_schema_too_deep_for_the_stack_that_is_left_is_a_typed_error() -> None:
    schema: Any = {"type": "null"}
    for _ in range(90):
        schema = {"type": "array", "items": schema}

    def beneath(depth: int) -> Any:
        return beneath(depth - 1) if depth else read_schema(schema, "here", strict=False)

    # The frame depth is what counts: how many there are here already is the test runner's affair.
    frame, used = sys._getframe(), 0
    while frame.f_back is not None:
        frame, used = frame.f_back, used + 1
    with pytest.raises(InvalidRequestError, match="stack"):
        beneath(sys.getrecursionlimit() - used - 60)


def test_references_that_lead_so_deep_that_native_code_would_overflow_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="levels"):
        json_constraint(chain(2000, {"type": "null"}))


def test_references_that_double_are_refused_before_anything_is_checked() -> None:
    schema = chain(24, {"type": "object", "propertyNames": {"maxLength": 3}}, twice=True)
    with pytest.raises(InvalidRequestError, match="references") as info:
        json_constraint(schema)
    assert info.value.field == "response_format.json_schema"


def tree(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"next": value}
    return value


def test_value_whose_check_would_double_with_each_level_counts_as_wrong() -> None:
    twice = [{"properties": {"next": {"$ref": "#"}}}, {"properties": {"next": {"$ref": "#"}}}]
    validator = Validator(json.dumps({"type": "object", "allOf": twice}), "here")
    assert validator.check(tree(5)) is None
    assert "cannot be checked" in str(validator.check(tree(18)))


def test_usual_recursive_schema_is_cheap_for_large_values() -> None:
    schema = {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "integer"}]}
    validator = Validator(json.dumps(schema), "here")
    assert validator.check([[1] * 100] * 200) is None
    assert not is_costly(Document(schema), [[1] * 100] * 200)


def test_references_in_a_circle_are_followed_once() -> None:
    assert Validator('{"anyOf": [{"$ref": "#"}, {"type": "string"}]}', "here").check("x") is None


def test_declared_key_that_can_be_spelled_twice_is_checked_when_the_value_is_whole() -> None:
    """A control character in any constant makes a second spelling possible; then the last value must be valid, too."""
    declared = {"a\n": {"type": "integer"}, "b": {"const": "\x1b"}}
    checks = json_constraint({"type": "object", "properties": declared, "additionalProperties": True}).checks
    assert checks.text('{"a\\n": 1, "\\u000a": "x"}') is None
    assert checks.text('{"a\\n": 1, "a\\u000a": "x"}') is not None


def test_strict_schema_lets_a_declared_key_be_spelled_in_one_way_only() -> None:
    open_ = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    assert fits(json_constraint(open_), '{"a": 1, "b\\n\\"": "x\\t"}')
    assert not fits(json_constraint(open_), '{"a": 1, "\\u0061": "x"}')
    assert fits(json_constraint({"type": "string"}), '"\\u001b"')
    assert fits(
        json_constraint({**open_, "required": ["k"], "properties": {"k": {"const": "\x1b"}}}), '{"k": "\\u001b"}'
    )


def test_schema_with_many_ids_is_written_out_no_more_than_a_smaller_one() -> None:
    def read(n: int) -> Counter[str]:
        properties = {f"p{i}": {"$id": f"p{i}", "type": "string"} for i in range(n)}
        return calls_in(lambda: read_schema({"type": "object", "properties": properties}, "here", strict=False))

    assert read(400)["dumps"] <= read(100)["dumps"] < 10


def test_anchors_are_looked_for_once() -> None:
    n = 200
    properties = {f"p{i}": {"$ref": f"#a{i}"} for i in range(n)}
    defs = {f"d{i}": {"$anchor": f"a{i}", "type": "null"} for i in range(n)}
    schema = {"type": "object", "properties": properties, "$defs": defs}
    assert calls_in(lambda: read_schema(schema, "here", strict=False))["nodes"] < 40 * n


def test_place_that_is_referred_to_is_looked_for_once() -> None:
    document = Document({"$defs": {f"D{i}": {"const": i} for i in range(20)}})
    references = [f"#/$defs/D{i}" for i in range(20)]
    seen = calls_in(lambda: [document.pointed(reference) for reference in references * 50])
    assert (seen["pointed"], seen["_pointed"]) == (1000, 20)
    assert [document.pointed(reference)["const"] for reference in references] == [*range(20)]
    assert document.pointed("#/$defs/none") is None


@pytest.mark.parametrize("value", [tree(18), {"next": tree(40)}], ids=["18 levels", "41 levels"])
def test_value_that_is_costly_is_not_looked_at_any_further(value: Any) -> None:
    """The steps are counted before the validator sees the value, and no more of them than are allowed."""
    document = Document({"type": "object", "allOf": [{"properties": {"next": {"$ref": "#"}}}] * 2})
    seen = calls_in(lambda: is_costly(document, value))
    assert is_costly(document, value)
    assert not is_costly(document, tree(5))
    assert seen["_beside"] < 200_000


def test_more_steps_are_allowed_to_a_value_that_took_more_tokens() -> None:
    """A long list costs as much as it has items, however often its schema is asked about each."""
    document = Document({"type": "array", "items": {"anyOf": [{"type": "integer"}] * 10}})
    assert not is_costly(document, [1] * 20_000)
    assert is_costly(Document({"type": "array", "items": {"anyOf": [{"type": "integer"}] * 200}}), [1] * 20_000)


def test_definitions_are_asked_for_a_value_again_only_where_something_has_changed() -> None:
    defs = {f"D{i}": {"$ref": f"#/$defs/D{i + 1}"} for i in range(400)} | {"D400": {"type": "null"}}
    assert calls_in(lambda: finite_definitions(defs))["has_value"] < 1000


def test_few_of_the_grammars_that_callers_write_are_kept_and_they_push_out_no_others() -> None:
    compiler = ConstraintCompiler(VOCABULARY)
    for number in range(40):
        for asked in (
            ResponseFormat(type="regex", regex=f"a{number}|(?s:.)*b"),
            ResponseFormat(type="choice", choices=(str(number),)),
        ):
            made = grammar_of(request(response_format=asked), PLAIN, in_reasoning=False)
            assert made is not None
            compiler.constraint(made)
    fields = Counter(kept.field for kept in compiler._kept)
    assert fields == {"response_format.regex": 8, "response_format.choices": 40}
    assert any("a39" in str(kept.rules) for kept in compiler._kept)


def test_regex_that_becomes_too_large_while_it_is_followed_is_named_by_the_error() -> None:
    made = constraint(request(response_format=ResponseFormat(type="regex", regex="(?s:.*)[a-m](?s:.){14}[n-z]")))
    chance = random.Random(1)

    def follow() -> None:
        for _ in range(200_000):
            made.mask()
            made.accept(chance.choice(b"abcxyz"))

    with pytest.raises(GenerationError, match=r"response_format\.regex"):
        follow()


TAGGED = Tagged(key_open="<p=", string_open=">\n", value_open=">\n", string_close="\n</p>\n", value_close="\n</p>\n")


def tagged(parameters: dict[str, Any]) -> TaggedArguments:
    tool = ToolSpec(name="t", parameters=parameters)
    return TaggedArguments(TAGGED, "t0", "tools.t.parameters", tool, Document(parameters))


def test_tagged_parameters_are_not_all_read_for_each_of_them() -> None:
    def work(n: int) -> int:
        parameters = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(n)}}
        return calls_in(tagged(parameters).node).total()

    assert work(400) < 6 * work(100)


def test_tagged_parameter_that_is_required_but_not_declared_is_refused() -> None:
    for parameters in (
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a", "zz"]},
        {"type": "object", "additionalProperties": False, "required": ["zz"]},
    ):
        with pytest.raises(InvalidRequestError, match="zz") as info:
            tagged(parameters).node()
        assert info.value.field == "tools.t.parameters"
