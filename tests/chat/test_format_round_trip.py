"""What a template renders for past calls is read back as these calls, whatever their names and arguments."""

from __future__ import annotations

import os
from datetime import date
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_worker._chat.analysis import format_of
from llama_worker._chat.calls import write_arguments, write_calls
from llama_worker._chat.format import ChatFormat
from llama_worker._chat.marks import whole_prefix
from llama_worker._chat.parser import OutputParser
from llama_worker._chat.template import ChatTemplate
from llama_worker._constraint.grammar import grammar_of
from llama_worker._events import ToolCallEnded
from llama_worker._requests import GenerationRequest, Message, ToolCall, ToolSpec
from tests.chat.templates import shipped_templates
from tests.constraint.walks import COMPILER, fits

TODAY = date(2026, 1, 31)
_ASKED = Message(role="user", content="Do it.")

# Arguments as JSON: name first or last, ids, numbers, arrays, keyed by the name, no mark at all.
WITH_JSON = (
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Apertus-8B-Instruct",
    "Kimi-K2-Thinking",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "meta-llama-Llama-3.1-8B-Instruct",
    "deepseek-ai-DeepSeek-V3.1",
    "upstage-Solar-Open-100B",
    "fireworks-ai-llama-3-firefunction-v2",
    "google-gemma-2-2b-it",
)
# Arguments one by one, and what is not text as JSON.
WITH_TAGS = (
    "GLM-4.6",
    "GLM-4.7-Flash",
    "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai-DeepSeek-V4",
    "Kimi-K3",
    "inclusionai-ling-3.0-flash",
    "MiniMax-M2",
    "openbmb-MiniCPM5-1B",
    "LFM2-8B-A1B",
)
# Of those, where it is written whether a value is text.
WITH_TYPES = ("deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4", "Kimi-K3", "openbmb-MiniCPM5-1B")
# The same, but written in Python's way by themselves: then it is given to them as JSON text.
IN_PYTHONS_WAY = (
    "Qwen3-Coder",
    "Qwen3.5-4B",
    "StepFun3.5-Flash",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "ByteDance-Seed-OSS",
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['"', "'", "<", ">", "</x>", "\n", "\\", "{}", "[TOOL", "&amp;", "ünï", "\u2028", "🙂", "", " ", "null", "7", "```"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
names = st.from_regex(r"[A-Za-z_][\w.-]{0,20}", fullmatch=True)
words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True)


def read_back(template: ChatTemplate, tools: list[ToolSpec], calls: list[ToolCall]) -> list[tuple[str, Any]]:
    """Name and arguments of each call that the parser finds in what the template renders for `calls`."""
    format = format_of(template)
    prompt = template.lay_out([_ASKED], tools=tools, format=format, today=TODAY).text
    said = Message(role="assistant", content="", tool_calls=tuple(calls))
    whole = template.lay_out([_ASKED, said], tools=tools, format=format, add_generation_prompt=False, today=TODAY).text
    before = whole_prefix(whole, prompt)
    return parsed(format, tools, before, whole[len(before) :])


def parsed(format: ChatFormat, tools: list[ToolSpec], prompt: str, reply: str) -> list[tuple[str, Any]]:
    numbers = count()
    parser = OutputParser(
        format,
        tools,
        calls=True,
        in_reasoning=format.reasoning is not None and prompt.rstrip().endswith(format.reasoning.open),
        new_id=lambda: f"id{next(numbers)}",
    )
    ended = [event.call for event in (*parser.feed(reply), *parser.flush()) if isinstance(event, ToolCallEnded)]
    return [(call.name, call.arguments) for call in ended]


def specs_of(calls: list[ToolCall]) -> list[ToolSpec]:
    """A tool for each name, whose schema says of each argument what it is."""
    found: dict[str, dict[str, Any]] = {}
    for call in calls:
        found.setdefault(call.name, {}).update({key: {"type": _type(value)} for key, value in call.arguments.items()})
    return [
        ToolSpec(name=name, description="a tool", parameters={"type": "object", "properties": properties})
        for name, properties in found.items()
    ]


def _type(value: object) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return kinds.get(type(value), "null")


def calls_of(arguments: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[ToolCall]]:
    one = st.tuples(names, arguments)
    return st.lists(one, min_size=1, max_size=2, unique_by=lambda call: call[0]).map(
        lambda made: [ToolCall(id=f"call0000{i}", name=name, arguments=given) for i, (name, given) in enumerate(made)]
    )


def at_most(calls: list[ToolCall], format: ChatFormat) -> list[ToolCall]:
    several = format.calls is not None and format.calls.separator is not None
    return calls if several else calls[:1]


counted = settings(
    max_examples=400 if os.environ.get("LLAMA_WORKER_PROOF") else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", WITH_JSON)
@counted
@given(calls=calls_of(st.dictionaries(texts.filter(str.strip), json_values, max_size=3)))
def test_calls_with_json_come_back(name: str, calls: list[ToolCall]) -> None:
    template = shipped_templates()[name]
    calls = at_most(calls, format_of(template))
    assert read_back(template, specs_of(calls), calls) == [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("name", WITH_TAGS)
@counted
@given(calls=calls_of(st.dictionaries(words, texts | st.integers() | st.lists(json_values, max_size=2), max_size=3)))
def test_tagged_calls_come_back(name: str, calls: list[ToolCall]) -> None:
    template = shipped_templates()[name]
    assert read_back(template, specs_of(calls), calls) == [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("name", WITH_TYPES)
@pytest.mark.parametrize("value", [None, "null", "", "a"])
def test_null_is_told_from_its_word_where_that_is_written(name: str, value: str | None) -> None:
    template = shipped_templates()[name]
    kind = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    tool = ToolSpec(name="f", parameters={"type": "object", "properties": {"note": kind}})
    call = ToolCall(id="call00001", name="f", arguments={"note": value})
    assert read_back(template, [tool], [call]) == [("f", {"note": value})]


_EITHER: dict[str, Any] = {
    "id": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "any": {},
    "kind": {"enum": ["a", "b", 1, None]},
    "note": {"type": ["string", "null", "array"]},
}


@pytest.mark.parametrize("name", [*WITH_TAGS, *IN_PYTHONS_WAY, "MiniMax-M3"])
@pytest.mark.parametrize(
    "given",
    [
        {"id": "a1", "any": 'a "b"\nc', "kind": "b", "note": "x"},
        {"id": "7", "any": "null", "kind": "a", "note": "null"},
        {"id": "", "any": "[1]", "kind": "a", "note": '"'},
        {"id": 7, "any": None, "kind": 1, "note": None},
        {"id": -7, "any": {"a": ["b"]}, "kind": None, "note": ["x"]},
    ],
)
def test_what_may_be_a_string_or_not_is_rendered_as_the_model_is_held_to_write_it(
    name: str, given: dict[str, Any]
) -> None:
    template = shipped_templates()[name]
    format = format_of(template)
    tool = ToolSpec(
        name="look_up", description="a tool", parameters={"type": "object", "properties": _EITHER, "required": ["id"]}
    )
    call = ToolCall(id="call00001", name="look_up", arguments=given)
    assert read_back(template, [tool], [call]) == [("look_up", given)]
    said = Message(role="assistant", content="", tool_calls=(call,))
    text = template.lay_out([_ASKED, said], tools=[tool], format=format, today=TODAY).text
    assert format.calls is not None
    asked = GenerationRequest(messages=(_ASKED,), tools=(tool,), tool_choice="required")
    grammar = grammar_of(asked, format, in_reasoning=False)
    assert grammar is not None
    written = write_calls(format.calls, [call], [tool])
    assert write_arguments(format.calls, given, tool) in text
    assert fits(COMPILER.constraint(grammar), written.rstrip("\n"))


@pytest.mark.parametrize("name", IN_PYTHONS_WAY)
@counted
@given(calls=calls_of(st.dictionaries(words, json_values, max_size=3)))
def test_values_that_a_template_writes_in_pythons_way_come_back(name: str, calls: list[ToolCall]) -> None:
    template = shipped_templates()[name]
    assert format_of(template).values_as_text
    assert read_back(template, specs_of(calls), calls) == [(call.name, call.arguments) for call in calls]
