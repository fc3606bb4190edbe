"""LangChain's messages as the worker's: nothing that was said, thought or called is lost, and nothing is twice."""

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_llama_worker._cut import spoiler
from langchain_llama_worker._messages import to_core
from llama_worker import InvalidRequestError, Message, ToolCall, UnsupportedFeatureError

CALL = {"name": "add", "args": {"a": 1}, "id": "1", "type": "tool_call"}
CORE_CALL = ToolCall(id="1", name="add", arguments={"a": 1})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("be brief"), Message(role="system", content="be brief")),
        (HumanMessage("hi", name="ann"), Message(role="user", content="hi", name="ann")),
        (AIMessage("hello"), Message(role="assistant", content="hello")),
        (AIMessageChunk(content="hello"), Message(role="assistant", content="hello")),
        (FunctionMessage("42", name="add"), Message(role="tool", content="42", name="add")),
        (ChatMessage("hi", role="user"), Message(role="user", content="hi")),
        (ChatMessage("hi", role="developer"), Message(role="system", content="hi")),
        (HumanMessage(["one ", {"type": "text", "text": "two"}]), Message(role="user", content="one two")),
        (HumanMessage([]), Message(role="user", content="")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_message_becomes_role_and_text(message: BaseMessage, expected: Message) -> None:
    assert to_core([message]) == [expected]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
        {"type": "tool_use", "id": "1", "name": "add", "input": {}},
    ],
    ids=lambda block: block["type"],
)
def test_content_that_is_not_text_is_refused_by_its_type(block: dict[str, object]) -> None:
    with pytest.raises(UnsupportedFeatureError, match=str(block["type"])):
        to_core([HumanMessage([{"type": "text", "text": "look"}, block])])


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="role='narrator'"):
        to_core([ChatMessage("once", role="narrator")])


# -- calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("so", tool_calls=[CALL]),
        AIMessage([{"type": "text", "text": "so"}], tool_calls=[CALL]),
        AIMessage(content_blocks=[{"type": "text", "text": "so"}, CALL]),
        AIMessage(
            [{"type": "text", "text": "so"}, CALL], tool_calls=[CALL], response_metadata={"output_version": "v1"}
        ),
        AIMessage([{"type": "text", "text": "so"}, CALL]),
        AIMessage(
            [{"type": "text", "text": "so"}, {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}],
            tool_calls=[CALL],
        ),
        AIMessage([{"type": "text", "text": "so"}, {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}]),
        AIMessage(
            [{"type": "text", "text": "so"}, {"type": "function_call", "id": "fc_9", "call_id": "1", "name": "add"}],
            tool_calls=[CALL],
        ),
        AIMessage(
            "so",
            additional_kwargs={"tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        ),
        AIMessageChunk(
            content="so",
            tool_call_chunks=[{"name": "add", "args": '{"a": 1}', "id": "1", "index": 1, "type": "tool_call_chunk"}],
        ),
    ],
    ids=[
        "tool_calls",
        "text block",
        "content_blocks",
        "v1, in both",
        "in the content only",
        "anthropic, in both",
        "anthropic, in the content only",
        "openai's own form",
        "openai's old place",
        "streamed",
    ],
)
def test_a_call_is_told_once_wherever_it_stands(message: AIMessage) -> None:
    assert to_core([message]) == [Message(role="assistant", content="so", tool_calls=(CORE_CALL,))]


def test_a_provider_s_form_that_nothing_else_tells_is_refused_and_not_dropped() -> None:
    with pytest.raises(UnsupportedFeatureError, match="function_call"):
        to_core([AIMessage([{"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"}])])


def test_a_call_without_an_id_is_one_too() -> None:
    [message] = to_core([AIMessage("", tool_calls=[{**CALL, "id": None}])])
    assert message.tool_calls == (ToolCall(id="", name="add", arguments={"a": 1}),)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"a": 1, "b": "tw', {"a": 1, "b": "tw"}),
        ('{"a": 1, "b": "tw' + spoiler('{"a": 1, "b": "tw'), {"a": 1, "b": "tw"}),
        ('{"a": [1, {"b": 2' + spoiler('{"a": [1, {"b": 2'), {"a": [1, {"b": 2}]}),
        ('{"a": 1}' + spoiler('{"a": 1}'), {"a": 1}),
        ("", {}),
        (spoiler(""), {}),
        ("a=1", {"arguments": "a=1"}),
        ("[" * 100_000, {}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_broken_call_is_shown_as_far_as_it_was_written(text: str, arguments: dict[str, Any]) -> None:
    """And its answer, which says that it was broken, keeps its partner."""
    broken = AIMessage("", invalid_tool_calls=[{"name": "add", "args": text, "id": "1", "error": "cut off"}])
    answer = ToolMessage("could not be executed", tool_call_id="1", status="error")
    told, answered = to_core([broken, answer])
    assert told.tool_calls == (ToolCall(id="1", name="add", arguments=arguments),)
    assert answered.tool_call_id == "1"


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (ToolMessage("42", tool_call_id="1", name="add"), "42"),
        (ToolMessage(["4", {"type": "text", "text": "2"}], tool_call_id="1", name="add"), "42"),
        (ToolMessage("no b", tool_call_id="1", name="add", status="error"), "Error: no b"),
        (ToolMessage("Error: no b", tool_call_id="1", name="add", status="error"), "Error: no b"),
        (ToolMessage("error 7", tool_call_id="1", name="add", status="error"), "error 7"),
        (ToolMessage("", tool_call_id="1", name="add", status="error"), "Error: "),
        (ToolMessage("42", tool_call_id="1", name="add", artifact=object()), "42"),
    ],
    ids=["text", "blocks", "failed", "says so itself", "in its own way", "failed without words", "artifact"],
)
def test_the_result_of_a_tool_keeps_its_id_its_name_and_that_it_failed(message: ToolMessage, content: str) -> None:
    assert to_core([message]) == [Message(role="tool", content=content, name="add", tool_call_id="1")]


# -- thoughts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "yes"}]),
        AIMessage([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "yes"}]),
        AIMessage([{"type": "reasoning_content", "reasoning_content": {"text": "hm"}}, "yes"]),
        AIMessage([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, "yes"]),
        AIMessage("yes", additional_kwargs={"reasoning_content": "hm"}),
        AIMessage([{"type": "reasoning", "reasoning": "hm"}, "yes"], additional_kwargs={"reasoning_content": "hm"}),
    ],
    ids=["v1", "anthropic", "bedrock", "openai", "aside", "in both places"],
)
def test_thoughts_are_told_once_and_are_not_text(message: AIMessage) -> None:
    assert to_core([message]) == [Message(role="assistant", content="yes", reasoning="hm")]


@pytest.mark.parametrize(
    "message",
    [
        AIMessage([{"type": "redacted_thinking", "data": "x"}, "yes"]),
        AIMessage("yes", additional_kwargs={"reasoning_content": ""}),
        AIMessage("yes", additional_kwargs={"reasoning_content": {"odd": 1}}),
    ],
    ids=["encrypted", "empty", "odd"],
)
def test_what_cannot_be_read_of_a_thought_is_none(message: AIMessage) -> None:
    assert to_core([message]) == [Message(role="assistant", content="yes")]
