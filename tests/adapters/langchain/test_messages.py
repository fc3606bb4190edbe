"""The translations between LangChain's messages and the worker's."""

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
from langchain_core.outputs import ChatGenerationChunk

from langchain_llama_worker._messages import ChatChunks, chat_result, generation_chunk, to_core
from llama_worker import (
    Finished,
    InvalidRequestError,
    Message,
    Reply,
    TextDelta,
    TokenLogprob,
    UnsupportedFeatureError,
    Usage,
)

USAGE = Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=7)
LOGPROBS = (
    TokenLogprob(token=1, text="a", logprob=-0.1, top=((1, "a", -0.1), (2, "b", -2.0))),
    TokenLogprob(token=3, text="c", logprob=-0.2, top=((3, "c", -0.2),)),
    TokenLogprob(token=4, text="", logprob=-0.3, top=()),
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("be brief"), Message(role="system", content="be brief")),
        (HumanMessage("hi", name="ann"), Message(role="user", content="hi", name="ann")),
        (AIMessage("hello"), Message(role="assistant", content="hello")),
        (AIMessageChunk("hello"), Message(role="assistant", content="hello")),
        (ToolMessage("42", tool_call_id="1", name="add"), Message(role="tool", content="42", name="add")),
        (FunctionMessage("42", name="add"), Message(role="tool", content="42", name="add")),
        (ChatMessage("hi", role="user"), Message(role="user", content="hi")),
        (ChatMessage("hi", role="developer"), Message(role="system", content="hi")),
        (HumanMessage(["one ", {"type": "text", "text": "two"}]), Message(role="user", content="one two")),
        (HumanMessage([]), Message(role="user", content="")),
        (
            AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "yes"}]),
            Message(role="assistant", content="yes"),
        ),
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


def test_a_past_tool_call_is_refused_rather_than_dropped() -> None:
    with pytest.raises(UnsupportedFeatureError, match="tool calls"):
        to_core([AIMessage("", tool_calls=[{"name": "add", "args": {}, "id": "1"}])])


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="role='narrator'"):
        to_core([ChatMessage("once", role="narrator")])


def _merged(
    events: list[TextDelta | Finished], *, usage: bool = True
) -> tuple[list[ChatGenerationChunk], AIMessageChunk]:
    chunks = ChatChunks("m", usage=usage)
    parts = [chunks.chunk(event) for event in events]
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    assert isinstance(whole.message, AIMessageChunk)
    return parts, whole.message


STREAMS = {
    "two deltas": [TextDelta("a"), TextDelta("c"), Finished(reason="stop", text="ac", usage=USAGE)],
    "no text": [Finished(reason="length", text="", usage=USAGE)],
    "logprobs": [
        TextDelta("a", LOGPROBS[:1]),
        TextDelta("c", LOGPROBS[1:2]),
        Finished(reason="stop", text="ac", usage=USAGE, logprobs=LOGPROBS),
    ],
}


@pytest.mark.parametrize("events", STREAMS.values(), ids=STREAMS)
def test_the_chunks_of_a_stream_add_up_to_the_whole_reply(events: list[TextDelta | Finished]) -> None:
    end = events[-1]
    assert isinstance(end, Finished)
    reply = Reply(text=end.text, finish_reason=end.reason, usage=end.usage, model="m", logprobs=end.logprobs)
    whole = chat_result(reply, "m").generations[0]
    parts, merged = _merged(events)
    assert merged.content == whole.message.content
    assert merged.usage_metadata == whole.message.usage_metadata
    assert merged.response_metadata == whole.message.response_metadata
    assert parts[-1].generation_info == whole.generation_info == {"finish_reason": end.reason}


@pytest.mark.parametrize("events", STREAMS.values(), ids=STREAMS)
def test_only_the_last_chunk_says_that_it_is_the_last(events: list[TextDelta | Finished]) -> None:
    parts, _ = _merged(events)
    positions = [part.message.chunk_position for part in parts]
    assert positions == [None] * (len(parts) - 1) + ["last"]


def test_usage_counts_the_cached_tokens_as_part_of_the_input() -> None:
    _, merged = _merged(STREAMS["two deltas"])
    assert merged.usage_metadata == {
        "input_tokens": 10,
        "output_tokens": 3,
        "total_tokens": 13,
        "input_token_details": {"cache_read": 7},
    }


def test_usage_can_be_left_out_of_a_stream() -> None:
    _, merged = _merged(STREAMS["two deltas"], usage=False)
    assert merged.usage_metadata is None


def test_logprobs_have_the_shape_that_users_know_from_openai() -> None:
    _, merged = _merged(STREAMS["logprobs"])
    content = merged.response_metadata["logprobs"]["content"]
    assert content[0] == {
        "token": "a",
        "bytes": [97],
        "logprob": -0.1,
        "top_logprobs": [
            {"token": "a", "bytes": [97], "logprob": -0.1},
            {"token": "b", "bytes": [98], "logprob": -2.0},
        ],
    }
    assert [entry["token"] for entry in content] == ["a", "c", ""]


def test_the_end_of_a_completion_carries_everything_but_the_text() -> None:
    end = generation_chunk(Finished(reason="stop", text="ac", usage=USAGE), "m", usage=True)
    assert end.text == ""
    assert end.generation_info is not None
    assert end.generation_info["finish_reason"] == "stop"
    assert end.generation_info["usage_metadata"]["total_tokens"] == 13
    assert generation_chunk(TextDelta("a"), "m", usage=True).generation_info is None
