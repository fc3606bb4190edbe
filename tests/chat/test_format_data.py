"""What is known of models that answer otherwise than their templates render, and that it is about real templates."""

from __future__ import annotations

from itertools import count
from typing import Any, TypeAlias

import pytest

from llama_worker._chat.analysis import format_of
from llama_worker._chat.format import ChatFormat, ReasoningSyntax, TextSyntax
from llama_worker._chat.format_data import ENTRIES, Entry, with_data
from llama_worker._chat.parser import OutputParser
from llama_worker._events import ReasoningDelta, ReplyEvent, TextDelta, ToolCallEnded
from llama_worker._requests import ToolSpec
from tests.chat.templates import shipped_templates

Said: TypeAlias = tuple[str, str, list[tuple[str, Any]]]

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "dry": {"type": "boolean"}},
}
TOOLS = [ToolSpec(name=name, parameters=PARAMETERS) for name in ("get_weather", "find_hotel")]


def read(name: str, reply: str) -> Said:
    """Thought, text and calls of a reply."""
    format = format_of(shipped_templates()[name])
    numbers = count()
    parser = OutputParser(format, TOOLS, calls=True, in_reasoning=False, new_id=lambda: f"id{next(numbers)}")
    events: list[ReplyEvent] = [*parser.feed(reply), *parser.flush()]
    thought = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    calls = [(event.call.name, event.call.arguments) for event in events if isinstance(event, ToolCallEnded)]
    return thought, text, calls


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.model)
def test_each_entry_is_about_a_shipped_template_and_about_few(entry: Entry) -> None:
    matched = [
        name for name, template in shipped_templates().items() if all(word in template.source for word in entry.words)
    ]
    assert 1 <= len(matched) <= 2, matched


def test_a_template_without_an_entry_is_left_as_it_was_derived() -> None:
    derived = ChatFormat(digest="1", origin="derived")
    assert with_data(derived, "no such words") is derived


# What these models are documented, or seen in llama.cpp's tests, to answer.
REPLIES: dict[str, tuple[str, Said]] = {
    "openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>The user asks.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Bern", "days": 2}',
        ("The user asks.", "", [("get_weather", {"city": "Bern", "days": 2})]),
    ),
    "LFM2-8B-A1B": (
        '<|tool_call_start|>[get_weather(city="Bern", days=2), find_hotel(city="it\'s")]<|tool_call_end|>',
        ("", "", [("get_weather", {"city": "Bern", "days": 2}), ("find_hotel", {"city": "it's"})]),
    ),
    "LFM2.5-Instruct": (
        '<|tool_call_start|>[get_weather(city="Bern", dry=true)]<|tool_call_end|>',
        ("", "", [("get_weather", {"city": "Bern", "dry": True})]),
    ),
    "HuggingFaceTB-SmolLM3-3B": (
        '<think>\nHm.\n</think>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>',
        ("Hm.", "", [("get_weather", {"city": "Bern"})]),
    ),
    "ibm-granite-granite-3.3-2B-Instruct": (
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Bern"}}]',
        ("", "", [("get_weather", {"city": "Bern"})]),
    ),
    "openbmb-MiniCPM5-1B": (
        '<function name="get_weather"><param name="city"><![CDATA[a < b]]></param>'
        '<param name="days">2</param></function>',
        ("", "", [("get_weather", {"city": "a < b", "days": 2})]),
    ),
    "Kimi-K3": (
        "<|open|>response<|sep|>Wait.<|close|>response<|sep|><|open|>tools<|sep|>"
        '<|open|>call tool="get_weather" index="1"<|sep|>'
        '<|open|>argument key="days" type="number"<|sep|>2<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        ("", "Wait.", [("get_weather", {"days": 2})]),
    ),
    "meta-llama-Llama-3.1-8B-Instruct": (
        '{"name": "get_weather", "parameters": {"city": "Bern"}}',
        ("", "", [("get_weather", {"city": "Bern"})]),
    ),
    "muse-glimmer": (
        " to=self<|message|>Hm.<|eom|><|start|>assistant to=get_weather<|message|><atem:function_calls>\n"
        '<atem:invoke name="get_weather">\n<atem:parameter name="days">2</atem:parameter>\n'
        "</atem:invoke>\n</atem:function_calls>",
        ("Hm.", "", [("get_weather", {"days": 2})]),
    ),
    "meetkai-functionary-medium-v3.2": (
        'get_weather\n{"city": "Bern"}>>>find_hotel\n{"days": 2}',
        ("", "", [("get_weather", {"city": "Bern"}), ("find_hotel", {"days": 2})]),
    ),
    "meetkai-functionary-medium-v3.2, text first": (
        'all\nI look.\n>>>get_weather\n{"city": "Bern"}>>>find_hotel\n{"days": 2}',
        ("", "I look.\n", [("get_weather", {"city": "Bern"}), ("find_hotel", {"days": 2})]),
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_what_these_models_answer_is_read(name: str) -> None:
    reply, expected = REPLIES[name]
    assert read(name.partition(", ")[0], reply) == expected


TEXTS: dict[str, tuple[str, Said]] = {
    "openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It rains.",
        ("Hm.", "It rains.", []),
    ),
    "ibm-granite-granite-3.3-2B-Instruct": (
        "<think>Hm.</think><response>It rains.</response>",
        ("Hm.", "It rains.", []),
    ),
    "meetkai-functionary-medium-v3.2": ("all\nIt rains.", ("", "It rains.", [])),
    "muse-glimmer": (" to=user<|message|>It rains.", ("", "It rains.", [])),
    "Cohere2MoE": ("<|START_TEXT|>It rains.<|END_TEXT|>", ("", "It rains.", [])),
    "upstage-Solar-Open-100B": (
        "<|think|>Hm.<|end|><|begin|>assistant<|content|>It rains.<|end|>",
        ("Hm.", "It rains.", []),
    ),
    "meta-llama-Llama-3.1-8B-Instruct": ('It rains: {"name": "x"}', ("", 'It rains: {"name": "x"}', [])),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_an_answer_is_read_without_its_marks(name: str) -> None:
    reply, expected = TEXTS[name]
    assert read(name, reply) == expected


THOUGHTS = {
    "Qwen-Qwen3-0.6B": ("<think>", "</think>"),
    "Qwen-QwQ-32B": ("<think>", "</think>"),
    "Bielik-11B-v3.0-Instruct": ("<think>", "</think>"),
    "ByteDance-Seed-OSS": ("<seed:think>", "</seed:think>"),
    "Cohere2MoE": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "google-gemma-4-31B-it": ("<|channel>thought", "<channel|>"),
    "Apriel-1.6-15b-Thinker-fixed": ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("[THINK]", "[/THINK]"),
    "tencent-Hy3": ("<think:opensource>", "</think:opensource>"),
    "upstage-Solar-Open-100B": ("<|think|>", "<|end|><|begin|>assistant"),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_are_known_of_real_templates(name: str) -> None:
    opening, closing = THOUGHTS[name]
    assert format_of(shipped_templates()[name]).reasoning == ReasoningSyntax(open=opening, close=closing)


def test_plain_text_is_marked_in_few_templates() -> None:
    marked = {name for name, template in shipped_templates().items() if format_of(template).text != TextSyntax()}
    assert "Qwen-Qwen3-0.6B" not in marked
    assert len(marked) < 12, marked
