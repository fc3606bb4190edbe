"""Two hundred pydantic models: what is generated for them is valid, however the tokens are chosen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama_worker import ToolSpec
from llama_worker._chat.parser import OutputParser
from llama_worker._constraint.validation import Validator
from llama_worker._events import ToolCallEnded
from llama_worker._requests import ToolCall
from tests.constraint.corpus import MODELS, UNSAID
from tests.constraint.walks import PLAIN, PROOF, constraint, json_constraint, reply, request

_WALKS = 20 if PROOF else 2


def schema(name: str) -> dict[str, Any]:
    return MODELS[name].model_json_schema()


def test_corpus_has_two_hundred_models() -> None:
    assert len(MODELS) >= 200


@pytest.mark.parametrize("name", MODELS)
def test_instances_are_valid(name: str) -> None:
    validator = Validator(json.dumps(schema(name)), name)
    made = [reply(json_constraint(schema(name)), seed) for seed in range(_WALKS)]
    ended = [text for text in made if text is not None]
    for text in ended:
        assert validator.check(json.loads(text)) is None, text
        if name not in UNSAID:
            MODELS[name].model_validate_json(text)


def test_all_but_few_are_enforced_whole() -> None:
    checked = [name for name in MODELS if isinstance(json_constraint(schema(name)).checks.answer, Validator)]
    assert checked == []


def test_nearly_all_come_to_an_end() -> None:
    made = [reply(json_constraint(schema(name)), 7) for name in MODELS]
    assert sum(text is None for text in made) < len(made) / 10


@pytest.mark.parametrize("name", list(MODELS)[:: 1 if PROOF else 10])
def test_models_as_tools_give_valid_calls(name: str) -> None:
    tool = ToolSpec(name="tool", parameters=schema(name))
    text = reply(constraint(request(tools=(tool,), tool_choice="required")), 5)
    if text is None:
        return
    parser = OutputParser(PLAIN, (tool,), calls=True, in_reasoning=False, new_id=lambda: "id")
    (call,) = [event.call for event in parser.feed(text) + parser.flush() if isinstance(event, ToolCallEnded)]
    assert isinstance(call, ToolCall), call
    assert Validator(json.dumps(schema(name)), name).check(call.arguments) is None
