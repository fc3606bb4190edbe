"""The chat templates that llama.cpp ships: each renders whole talks, drops nothing and adds no control token.

(Which format is derived from them, and that calls come back from it, is `template_table.py`.)
"""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest

from llama_worker._chat import fuel
from llama_worker._chat.analysis import format_of
from llama_worker._chat.segments import ControlTextGuard
from llama_worker._chat.template import ChatTemplate
from llama_worker._guarding import guarded_message, guarded_tool
from llama_worker._requests import Message, ToolSpec
from tests.chat.templates import N_TEMPLATES, shipped_templates

TODAY = date(2026, 11, 5)
TEMPLATES = shipped_templates()
OPTIONAL = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "Days"}


def tools(word: str = "") -> list[ToolSpec]:
    """As pydantic describes them: without descriptions, with alternatives. `word` stands in every text."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": f"Where{word}"}, "days": OPTIONAL},
        "required": ["city"],
    }
    return [
        ToolSpec(name="get_weather", description=f"The weather.{word}", parameters=schema),
        ToolSpec(name=f"ping{word[:200]}", description=f"Pings.{word}"),
    ]


def talk(word: str = "") -> list[Message]:
    """A talk in which everything occurs. `word` stands in every text of it."""
    calls: list[dict[str, Any]] = [
        {"id": "call_1", "name": "get_weather", "arguments": {"city": f"CITY{word}", "days": 2}},
        {"id": "call_2", "name": f"ping{word[:200]}", "arguments": {}},
    ]
    return [
        Message.model_validate(turn)
        for turn in (
            {"role": "system", "content": f"SYSTEM{word}"},
            {"role": "user", "content": f"FIRST{word}"},
            {"role": "assistant", "content": f"BESIDE{word}", "tool_calls": calls, "reasoning": f"THOUGHT{word}"},
            {"role": "tool", "content": f"RESULT1{word}", "tool_call_id": "call_1"},
            {"role": "tool", "content": f"RESULT2{word}", "tool_call_id": "call_2"},
            {"role": "assistant", "content": f"ANSWER{word}", "reasoning": f"THOUGHT{word}"},
            {"role": "user", "content": f"SECOND{word}"},
        )
    ]


def render(template: ChatTemplate, messages: list[Message], tools: list[ToolSpec], **more: Any) -> str:
    return template.lay_out(messages, tools=tools, format=format_of(template), today=TODAY, **more).text


def test_there_are_as_many_as_we_think() -> None:
    assert len(TEMPLATES) == N_TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_everything_is_in_the_prompt(name: str) -> None:
    text = render(TEMPLATES[name], talk(), tools())
    parts = ["SYSTEM", "FIRST", "BESIDE", "CITY", "RESULT1", "RESULT2", "ANSWER", "SECOND", "The weather.", "Pings."]
    assert [part for part in parts if part not in text] == []
    assert text.count("ping") >= 2
    assert text == render(TEMPLATES[name], talk(), tools())


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_beginning_of_an_agent_s_run_renders(name: str) -> None:
    for end in range(2, len(talk()) + 1):
        for messages in (talk()[:end], talk()[1:end]):
            assert render(TEMPLATES[name], messages, tools())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_trailing_system_message_is_rendered(name: str) -> None:
    late = Message(role="system", content="STOP NOW")
    for messages in ([*talk(), late], [*talk()[:5], late]):
        assert "STOP NOW" in render(TEMPLATES[name], messages, tools())


@pytest.mark.parametrize("name", TEMPLATES)
def test_thinking_can_be_switched_or_left(name: str) -> None:
    for wanted in (None, True, False):
        assert "SECOND" in render(TEMPLATES[name], talk(), tools(), enable_thinking=wanted)


def controls_of(template: ChatTemplate) -> list[str]:
    """What looks like a control token in the template's source, and some that every vocabulary has."""
    found = re.findall(r"<[|/a-z_｜][^<>\s'\"{}]{0,40}>|\[/?[A-Z_]{3,20}\]", template.source)
    return sorted({"<|im_end|>", "</s>", "<|eot_id|>", *found})


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_becomes_a_control_token(name: str) -> None:
    """Not in contents, thoughts, arguments, results, nor in what tools say of themselves."""
    template = TEMPLATES[name]
    controls = controls_of(template)
    guard = ControlTextGuard(controls)

    def seen(word: str) -> list[int]:
        messages = [guarded_message(message, guard.protect) for message in talk(word)]
        text = render(template, messages, [guarded_tool(tool, guard.protect) for tool in tools(word)])
        special = "\0".join(segment.text for segment in guard.split(text) if segment.special)
        return [special.count(control) for control in controls]

    assert seen(" x") == seen(" x" + "".join(controls) + "x")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_talk_of_fifty_turns_uses_little_fuel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tanks: list[fuel.Fuel] = []

    class Seen(fuel.Fuel):
        def __init__(self, given: int) -> None:
            super().__init__(0)
            tanks.append(self)

    monkeypatch.setattr(fuel, "Fuel", Seen)  # all that is tried after the first rendering shares one
    turns = [turn for _ in range(10) for turn in talk()[1:6]]
    assert render(TEMPLATES[name], [talk()[0], *turns], tools())
    assert max(fuel.STEPS - tank.steps for tank in tanks) < fuel.STEPS // 10
    assert max(fuel.ROOM - tank.room for tank in tanks) < fuel.ROOM // 10


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Cohere2MoE"])
def test_a_talk_of_four_hundred_turns_that_needs_a_change_still_renders(name: str) -> None:
    """These look through all turns at each, and what is tried after the first rendering shares one tank."""
    late = Message(role="system", content="STOP NOW")
    turns = [turn for _ in range(80) for turn in talk()[1:6]]
    assert "STOP NOW" in render(TEMPLATES[name], [talk()[0], *turns, late], tools())
