"""Calls are written word for word as their syntax says."""

from __future__ import annotations

from typing import Any

import pytest

from llama_worker._chat.calls import write_calls
from llama_worker._requests import ToolCall
from tests.chat.formats import SYNTAXES, TOOLS

CALL = ToolCall(id="a b", name="get_weather", arguments={"city": 'Ulm "1"', "days": 2, "note": None})


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm \\"1\\"", "days": 2, "note": null}}\n'
            "</tool_call>",
        ),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Ulm \\"1\\"", "days": 2, "note": null}, '
            '"id": "a_b"}]',
        ),
        (
            "kimi",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
            '{"city": "Ulm \\"1\\"", "days": 2, "note": null}<|tool_call_end|><|tool_calls_section_end|>',
        ),
        (
            "qwen-coder",
            '<tool_call>\n<function=get_weather>\n<parameter=city>\nUlm "1"\n</parameter>\n<parameter=days>\n2\n'
            "</parameter>\n<parameter=note>\nnull\n</parameter>\n</function>\n</tool_call>",
        ),
        ("gemma", '<|tool_call>call:get_weather{city:<|"|>Ulm "1"<|"|>,days:2,note:null}<tool_call|>'),
        ("key-again", '<call><get_weather><city>Ulm "1"</city><days>2</days><note>null</note></get_weather></call>'),
        (
            "typed",
            '<|open|>call get_weather\n<|key|>city" type="string">Ulm "1"<|end|><|key|>days" type="number">2<|end|>'
            '<|key|>note" type="null">null<|end|><|close|>',
        ),
        ("json-strings", '<fn>get_weather(city="Ulm \\"1\\"", days=2, note=null)</fn>'),
        (
            "text-arguments",
            '<function_call>{"name": "get_weather", "arguments": '
            '"{\\"city\\": \\"Ulm \\\\\\"1\\\\\\"\\", \\"days\\": 2, \\"note\\": null}"}</function_call>',
        ),
    ],
)
def test_a_call_is_written_as_its_syntax_says(syntax: str, text: str) -> None:
    assert write_calls(SYNTAXES[syntax], [CALL], TOOLS) == text


def test_several_calls_are_written_with_what_stands_between_them() -> None:
    ping = ToolCall(id="", name="ping", arguments={})
    assert write_calls(SYNTAXES["mistral"], [ping, ping], TOOLS) == (
        '[TOOL_CALLS][{"name": "ping", "arguments": {}, "id": "call_0"}, '
        '{"name": "ping", "arguments": {}, "id": "call_1"}]'
    )
    once = write_calls(SYNTAXES["typed"], [ping], TOOLS)
    assert write_calls(SYNTAXES["typed"], [ping, ping], TOOLS) == once + once
    assert write_calls(SYNTAXES["hermes"], [], TOOLS) == ""


@pytest.mark.parametrize(
    ("value", "written"),
    [("text", "text"), (5, "5"), (None, "null"), ([1, "a"], '[1, "a"]'), ({"ä": True}, '{"ä": true}')],
)
def test_a_tool_that_is_not_known_has_its_strings_written_as_they_are(value: Any, written: str) -> None:
    text = write_calls(SYNTAXES["glm"], [ToolCall(id="", name="f", arguments={"x": value})], [])
    assert f"<arg_value>{written}</arg_value>" in text


def test_a_tool_without_properties_in_its_schema_is_written_too() -> None:
    text = write_calls(SYNTAXES["glm"], [ToolCall(id="", name="ping", arguments={"x": "a"})], TOOLS)
    assert '<arg_value>"a"</arg_value>' in text
