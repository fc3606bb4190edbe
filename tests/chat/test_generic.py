"""Tools for a model whose template knows none: described, called and read back as text."""

from __future__ import annotations

from datetime import date
from itertools import count

from llama_worker._chat.analysis import format_of
from llama_worker._chat.calls import write_calls
from llama_worker._chat.generic import GENERIC_CALLS, describe_tools
from llama_worker._chat.parser import OutputParser
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._events import ToolCallEnded
from llama_worker._requests import Message, ToolCall, ToolSpec

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    ToolSpec(name="get_weather", description="Today's weather.", parameters=PARAMETERS),
    ToolSpec(name="get_time"),
]
CALL = ToolCall(id="call_1", name="get_weather", arguments={"city": 'Zürich "<1>"\n'})


def test_no_tools_need_no_words() -> None:
    assert describe_tools([], GENERIC_CALLS) == ""


def test_every_tool_is_described_whole_and_once() -> None:
    text = describe_tools(TOOLS, GENERIC_CALLS)
    assert text.count('"get_weather"') == text.count('"get_time"') == 1
    assert '"Today\'s weather."' in text
    assert '"required": ["city"]' in text


def test_the_description_is_short_for_small_models() -> None:
    assert len(describe_tools([ToolSpec(name="f")], GENERIC_CALLS)) < 500


def test_the_example_in_the_description_is_a_call_that_can_be_read() -> None:
    found = format_of(ChatTemplate(CHATML, bos_text="", eos_text=""))
    text = describe_tools(TOOLS, GENERIC_CALLS)
    parser = OutputParser(found, [ToolSpec(name="tool_name")], calls=True, in_reasoning=False, new_id=lambda: "1")
    ended = [event.call for event in (*parser.feed(text), *parser.flush()) if isinstance(event, ToolCallEnded)]
    assert [(call.name, call.arguments) for call in ended] == [("tool_name", {"argument": "value"})]


def test_a_template_without_tools_is_told_of_them_and_of_past_calls() -> None:
    template = ChatTemplate(CHATML, bos_text="", eos_text="")
    found = format_of(template)
    chat = [
        Message(role="user", content="Weather?"),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content="It rains.", tool_call_id="call_1"),
    ]
    text = template.lay_out(chat, tools=TOOLS, format=found, today=date(2026, 1, 31)).text
    assert describe_tools(TOOLS, GENERIC_CALLS) in text
    assert write_calls(GENERIC_CALLS, [CALL], TOOLS) in text
    assert "It rains." in text


def test_calls_that_were_written_are_read_back() -> None:
    found = format_of(ChatTemplate(CHATML, bos_text="", eos_text=""))
    numbers = count()
    parser = OutputParser(found, TOOLS, calls=True, in_reasoning=False, new_id=lambda: f"id{next(numbers)}")
    text = write_calls(GENERIC_CALLS, [CALL, CALL], TOOLS)
    ended = [event.call for event in (*parser.feed(text), *parser.flush()) if isinstance(event, ToolCallEnded)]
    assert [call.arguments for call in ended] == [CALL.arguments] * 2
