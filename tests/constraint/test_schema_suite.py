"""Where we said strict, the JSON Schema Test Suite finds nothing that the schema forbids; every refusal is typed."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from llama_worker import InvalidRequestError
from llama_worker._constraint.validation import Validator
from tests.constraint.schema_suite import Group, groups
from tests.constraint.walks import PROOF, accepted, json_constraint, reply

_WALKS = 30 if PROOF else 3


@cache
def enforced() -> tuple[Group, ...]:
    """The groups whose schemas are enforced whole."""
    return tuple(group for group in groups() if _compiles(group.schema, strict=True))


def _compiles(schema: Any, *, strict: bool) -> bool:
    try:
        json_constraint(schema, strict=strict)
    except InvalidRequestError:
        return False
    return True


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def test_suite_is_there_and_much_of_it_is_enforced() -> None:
    assert len(groups()) > 300
    assert len(enforced()) > 150


def test_no_invalid_instance_is_accepted() -> None:
    """The valid ones need not be: the order of keys is fixed, and open objects are closed."""
    wrong = [
        (group.name, value)
        for group in enforced()
        for value, valid in group.instances
        if not valid and accepted(json_constraint(group.schema, strict=True), _text(value)) == len(_text(value))
    ]
    assert wrong == []


def test_what_is_generated_is_valid() -> None:
    wrong, ended = [], 0
    for group in enforced():
        validator = Validator(_text(group.schema), "schema")
        for seed in range(_WALKS):
            text = reply(json_constraint(group.schema, strict=True), seed)
            ended += text is not None
            if text is not None and validator.check(json.loads(text)) is not None:
                wrong.append((group.name, text))
    assert wrong == []
    assert ended > len(enforced()) * _WALKS * 0.8


def test_without_strict_a_schema_is_enforced_checked_or_refused_by_type() -> None:
    wrong = []
    for group in groups():
        try:
            made = json_constraint(group.schema)
        except InvalidRequestError:
            continue
        text = reply(made, 1)
        if text is None or made.checks.text(text) is not None:
            continue
        if Validator(_text(group.schema), "schema").check(json.loads(text)) is not None:
            wrong.append((group.name, text))
    assert wrong == []


@pytest.mark.parametrize("keyword", ["not", "$dynamicRef"])
def test_keywords_that_are_refused_always_are(keyword: str) -> None:
    for group in groups():
        if isinstance(group.schema, dict) and keyword in group.schema:
            assert not _compiles(group.schema, strict=False), group.name
