"""ChatFormat to and from transformers' response_template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from llama_worker._chat.analysis import format_of
from llama_worker._chat.calls import write_calls
from llama_worker._chat.format import CallSyntax, ChatFormat, Slot, Tagged
from llama_worker._chat.response_template import from_response_template, to_response_template
from llama_worker._errors import InvalidRequestError, UnsupportedFeatureError
from llama_worker._requests import ToolCall, ToolSpec
from tests.chat.templates import shipped_templates

TOOLS = [ToolSpec(name="f", parameters={"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}})]
CALLS = [
    ToolCall(id="call00001", name="f", arguments={"a": "x < y", "b": 7}),
    ToolCall(id="call00002", name="f", arguments={"a": "z", "b": -1}),
]
HERMES = CallSyntax(
    call=('<tool_call>\n{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}\n</tool_call>"),
    separator="\n",
    trigger="<tool_call>",
)


def format_with(**fields: Any) -> ChatFormat:
    return ChatFormat(digest="", origin="data", turn_open="<|a|>", calls=replace(HERMES, **fields))


def expressed() -> dict[str, tuple[ChatFormat, dict[str, Any]]]:
    """The shipped templates' formats that can be expressed, and how."""
    found = {}
    for name, template in shipped_templates().items():
        format = format_of(template)
        try:
            found[name] = format, to_response_template(format)
        except UnsupportedFeatureError:
            continue
    return found


def test_nearly_all_formats_can_be_expressed_and_come_back() -> None:
    found = expressed()
    assert len(found) >= 0.85 * len(shipped_templates())
    other = set()
    for name, (format, template) in found.items():
        back = from_response_template(json.loads(json.dumps(template)))
        assert (back.reasoning, back.text, back.turn_open) == (format.reasoning, format.text, format.turn_open)
        assert to_response_template(back) == template or name in SPACED, name
        other |= {name} if back.calls != format.calls else set()
    assert other == SPACED


# How JSON is spaced, and what is a number in a string, is not said in a response_template.
SPACED = {
    "Cohere2MoE",
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
}


def test_the_patterns_find_the_calls_that_the_format_writes() -> None:
    """What transformers does: search what opens, search what closes, read what is between, put it into the form."""
    for name, (format, template) in expressed().items():
        field = template["fields"]["tool_calls"]
        assert format.calls is not None
        calls = CALLS if format.calls.separator is not None else CALLS[:1]
        found = list(regions(field, write_calls(format.calls, calls, TOOLS)))
        assert [call["name"] for call in found] == ["f"] * len(calls), name
        if field["content"] == "json" and "content_args" not in field:
            assert [call["arguments"] for call in found] == [call.arguments for call in calls], name


def regions(field: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
    at = 0
    while opened := re.compile(field["open_pattern"], re.DOTALL).search(text, at):
        closed = re.compile(field["close_pattern"], re.DOTALL).search(text, opened.end())
        assert closed is not None
        body = text[opened.end() : closed.start()]
        content = json.loads(body) if field["content"] == "json" and "content_args" not in field else body
        scopes: Any = content if field.get("transform_each") else [{"content": content}]
        for scope in scopes:
            transform = field["transform"]
            transform = transform[0] if isinstance(transform, list) else transform
            yield {key: placed(place, {**opened.groupdict(), **scope}) for key, place in transform["function"].items()}
        at = closed.end()


def placed(place: str, scope: dict[str, Any]) -> Any:
    value: Any = scope
    for key in place.strip("{}").split("."):
        value = value[key]
    return value


# As transformers 5.23 has them for models whose tokenizers bring none.
QWEN: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>)", "content": "text"},
    },
}
TAGS = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
GEMMA = {
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
    },
}


def test_transformers_own_templates_are_read() -> None:
    assert from_response_template(QWEN).calls == HERMES
    tags = from_response_template(TAGS).calls
    assert tags is not None
    assert tags.call == ("<tool_call>\n<function=", Slot.NAME, ">", Slot.ARGUMENTS, "</function>\n</tool_call>")
    assert isinstance(tags.arguments, Tagged)
    gemma = from_response_template(GEMMA)
    derived = format_of(shipped_templates()["google-gemma-4-31B-it"])
    assert gemma.calls == derived.calls
    assert gemma.turn_open == derived.turn_open


@pytest.mark.parametrize(
    "format",
    [
        format_with(arguments="json_string"),
        format_with(trigger="", only_at_start=True),
        format_with(call=("<call>", Slot.ARGUMENTS, Slot.NAME, "</call>")),
        format_with(arguments=Tagged(key_open="", string_open="='", string_close="'", value_open="=", value_close="")),
        replace(format_with(), turn_open=""),
    ],
)
def test_what_cannot_be_expressed_is_refused(format: ChatFormat) -> None:
    with pytest.raises(UnsupportedFeatureError):
        to_response_template(format)


def changed(field: str, **values: object) -> dict[str, Any]:
    fields = {name: dict(value) for name, value in QWEN["fields"].items()}
    fields.setdefault(field, {}).update(values)
    return {**QWEN, "fields": fields}


@pytest.mark.parametrize(
    "template",
    [
        {},
        {"fields": []},
        changed("other", content="text"),
        changed("tool_calls", content="kv-lines"),
        changed("tool_calls", transform_each=True, transform={"function": {}}),
        changed("tool_calls", join=", "),
        changed("tool_calls", transform={"function": {"name": "{content.a.b}"}}),
        changed("tool_calls", transform={"function": {"name": "{content.a}", "arguments": "{content.a.b}"}}),
        changed("tool_calls", open_pattern=r"<tool_call>.*?"),
        changed("tool_calls", open_pattern=r"(?P<other>\w+)"),
        changed("tool_calls", open_pattern=7),
        changed("tool_calls", content="xml-inline", content_args={"tag_pattern": "<p>"}),
        changed("tool_calls", content_args={"allow_non_json": True}),
        changed("reasoning_content", close=""),
    ],
)
def test_what_is_not_understood_is_refused_with_its_field(template: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="response_template"):
        from_response_template(template)
