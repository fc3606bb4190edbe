"""The worker's replies as LangChain's results: the chunks of a stream add up to the whole."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models._compat_bridge import chunks_to_events
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk

from langchain_llama_worker._calls import Answer, Call, _answer
from langchain_llama_worker._messages import to_core
from langchain_llama_worker._replies import ChatChunks, chat_result, generation_chunk
from langchain_llama_worker._retry import RetryPolicy
from llama_worker import (
    Finished,
    GenerationCancelled,
    InvalidToolCall,
    ReasoningDelta,
    Reply,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
    Usage,
)
from llama_worker.testing import assert_well_formed

USAGE = Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=7, reasoning_tokens=1)
LOGPROBS = (
    TokenLogprob(token=1, text="a", logprob=-0.1, top=((1, "a", -0.1), (2, "b", -2.0))),
    TokenLogprob(token=3, text="c", logprob=-0.2, top=((3, "c", -0.2),)),
    TokenLogprob(token=4, text="", logprob=-0.3, top=()),
)


def called(index: int, arguments: str, *pieces: str, error: str = "") -> list[Answer]:
    """The events of one call, whole or, with `error`, none."""
    call_id, name = f"c{index}", f"tool{index}"
    end: ToolCall | InvalidToolCall = (
        InvalidToolCall(id=call_id, name=name, arguments=arguments, error=error)
        if error
        else ToolCall.model_validate({"id": call_id, "name": name, "arguments": arguments})
    )
    deltas = [ToolCallDelta(index=index, arguments=piece) for piece in pieces or [arguments] if piece]
    return [ToolCallStarted(index=index, id=call_id, name=name), *deltas, ToolCallEnded(index=index, call=end)]


def stream(reason: Any, *events: Answer, logprobs: tuple[TokenLogprob, ...] = ()) -> list[Answer]:
    """`events` and the end that belongs to them."""
    calls = [event.call for event in events if isinstance(event, ToolCallEnded)]
    end = Finished(
        reason=reason,
        text="".join(event.text for event in events if isinstance(event, TextDelta)),
        reasoning="".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        usage=USAGE,
        logprobs=logprobs,
        tool_calls=tuple(call for call in calls if isinstance(call, ToolCall)),
        invalid_tool_calls=tuple(call for call in calls if isinstance(call, InvalidToolCall)),
    )
    assert_well_formed([*events, end])
    return [*events, end]


STREAMS: dict[str, list[Answer]] = {
    "two deltas": stream("stop", TextDelta("a"), TextDelta("c")),
    "no text": stream("length"),
    "logprobs": stream("stop", TextDelta("a", LOGPROBS[:1]), TextDelta("c", LOGPROBS[1:2]), logprobs=LOGPROBS),
    "thoughts": stream("stop", ReasoningDelta("h"), ReasoningDelta("m"), TextDelta("yes")),
    "a call": stream("tool_calls", *called(0, '{"x": 1}', '{"x"', ": 1}")),
    "a call without arguments": stream("tool_calls", *called(0, "{}")),
    "text, then two calls": stream("tool_calls", TextDelta("so "), *called(0, '{"x": 1}'), *called(1, '{"y": "z"}')),
    "thoughts, text, call, text": stream(
        "tool_calls",
        ReasoningDelta("hm"),
        TextDelta("so"),
        *called(0, "{}"),
        TextDelta(" then"),
        *called(1, '{"y": 2}'),
    ),
    "thoughts and logprobs": stream(
        "stop", TextDelta("a", LOGPROBS[:1]), ReasoningDelta("c"), TextDelta("d", LOGPROBS[2:]), logprobs=LOGPROBS
    ),
}
IN_TURNS = {"thoughts, text, call, text", "thoughts and logprobs"}
"""Only a stream knows the order in which such a reply went to and fro."""
CUT: dict[str, list[Answer]] = {
    "in a number": stream("length", *called(0, '{"to": "bob", "amount": 10', error="cut off")),
    "in a string": stream("length", *called(0, '{"to": "bo', error="cut off")),
    "in a list": stream("length", *called(0, '{"to": ["bo', '{"to"', ': ["bo', error="cut off")),
    "in an escape": stream("length", *called(0, '{"to": "bo' + "\\", error="cut off")),
    "before the arguments": stream("length", TextDelta("so"), *called(0, "", error="cut off")),
    "not as its tool wants it": stream("stop", *called(0, '{"to": 1}', error="to: not a string")),
    "after a good one": stream("length", *called(0, '{"x": 1}'), *called(1, '{"y": "b', error="cut off")),
}


def whole(events: list[Answer], **form: Any) -> AIMessage:
    end = events[-1]
    assert isinstance(end, Finished)
    reply = Reply(
        text=end.text,
        finish_reason=end.reason,
        usage=end.usage,
        model="m",
        logprobs=end.logprobs,
        reasoning=end.reasoning,
        tool_calls=end.tool_calls,
        invalid_tool_calls=end.invalid_tool_calls,
    )
    generation = chat_result(reply, "m", **form).generations[0]
    assert generation.generation_info == {"finish_reason": end.reason}
    assert isinstance(generation.message, AIMessage)
    return generation.message


def chunks_of(events: list[Answer], **form: Any) -> list[ChatGenerationChunk]:
    chunks = ChatChunks("m", **{"usage": True, **form})
    return [chunk for event in events if (chunk := chunks.chunk(event)) is not None]


def merged(events: list[Answer], **form: Any) -> AIMessageChunk:
    first, *rest = chunks_of(events, **form)
    message = (first + rest if rest else first).message
    assert isinstance(message, AIMessageChunk)
    return message


def without_places(content: Any) -> Any:
    return [{k: v for k, v in b.items() if k != "index"} for b in content] if isinstance(content, list) else content


@pytest.mark.parametrize("in_blocks", [False, True], ids=["text", "v1"])
@pytest.mark.parametrize("events", STREAMS.values(), ids=STREAMS)
def test_the_chunks_of_a_stream_add_up_to_the_whole_reply(events: list[Answer], in_blocks: bool) -> None:
    told, said = merged(events, in_blocks=in_blocks), whole(events, in_blocks=in_blocks)
    assert told.text == said.text
    assert told.tool_calls == said.tool_calls
    assert told.usage_metadata == said.usage_metadata
    assert told.response_metadata == said.response_metadata
    assert told.additional_kwargs == said.additional_kwargs
    assert told.invalid_tool_calls == said.invalid_tool_calls == []


@pytest.mark.parametrize("in_blocks", [False, True], ids=["text", "v1"])
@pytest.mark.parametrize("name", sorted(set(STREAMS) - IN_TURNS))
def test_blocks_are_the_same_streamed_or_not(name: str, in_blocks: bool) -> None:
    events = STREAMS[name]
    told, said = merged(events, in_blocks=in_blocks), whole(events, in_blocks=in_blocks)
    assert without_places(told.content_blocks) == without_places(said.content_blocks)


def test_in_blocks_what_is_said_between_calls_keeps_its_place() -> None:
    """Where LangChain numbers blocks itself, text after two calls runs into the first."""
    told = merged(STREAMS["thoughts, text, call, text"], in_blocks=True)
    kinds = [block["type"] for block in told.content_blocks]
    assert kinds == ["reasoning", "text", "tool_call", "text", "tool_call"]


@pytest.mark.parametrize("in_blocks", [False, True], ids=["text", "v1"])
@pytest.mark.parametrize("events", [*STREAMS.values(), *CUT.values()], ids=[*STREAMS, *CUT])
def test_every_chunk_says_one_thing_and_says_it_once(events: list[Answer], in_blocks: bool) -> None:
    parts = [chunk.message for chunk in chunks_of(events, in_blocks=in_blocks)]
    assert all(isinstance(part, AIMessageChunk) for part in parts)
    assert not [part for part in parts if part.text and part.tool_call_chunks]  # type: ignore[attr-defined]
    pieces = [piece for part in parts for piece in part.tool_call_chunks]  # type: ignore[attr-defined]
    started = [event for event in events if isinstance(event, ToolCallStarted)]
    assert [(p["name"], p["id"]) for p in pieces if p["name"] or p["id"]] == [(e.name, e.id) for e in started]
    assert [part.response_metadata.get("model_name") for part in parts] == ["m", *[None] * (len(parts) - 1)]
    positions = [part.chunk_position for part in parts]  # type: ignore[attr-defined]
    assert positions == [None] * (len(parts) - 1) + ["last"]


# -- what was cut off -------------------------------------------------------------------------------


@pytest.mark.parametrize("in_blocks", [False, True], ids=["text", "v1"])
@pytest.mark.parametrize("events", CUT.values(), ids=CUT)
def test_a_call_that_is_none_never_becomes_one(events: list[Answer], in_blocks: bool) -> None:
    """LangChain would complete `{"amount": 10` and pay ten."""
    told, said = merged(events, in_blocks=in_blocks), whole(events, in_blocks=in_blocks)
    assert told.tool_calls == said.tool_calls
    assert [c["id"] for c in told.invalid_tool_calls] == [c["id"] for c in said.invalid_tool_calls] != []
    assert [c["name"] for c in told.invalid_tool_calls] == [c["name"] for c in said.invalid_tool_calls]
    for streamed, plain in zip(told.invalid_tool_calls, said.invalid_tool_calls, strict=True):
        assert str(streamed["args"]).startswith(str(plain["args"]))
        assert plain["error"]
    valid = [block["id"] for block in told.content_blocks if block["type"] == "tool_call"]
    assert valid == [call["id"] for call in said.tool_calls]


@pytest.mark.parametrize("in_blocks", [False, True], ids=["text", "v1"])
@pytest.mark.parametrize("events", CUT.values(), ids=CUT)
def test_why_a_call_is_none_is_told_streamed_or_not(events: list[Answer], in_blocks: bool) -> None:
    """And what it says is not told again."""
    told, said, end = merged(events, in_blocks=in_blocks), whole(events, in_blocks=in_blocks), events[-1]
    assert isinstance(end, Finished)
    reasons = [{"id": call.id, "name": call.name, "error": call.error} for call in end.invalid_tool_calls]
    assert told.response_metadata["invalid_tool_calls"] == said.response_metadata["invalid_tool_calls"] == reasons
    early = [chunk.message.response_metadata for chunk in chunks_of(events, in_blocks=in_blocks)[:-1]]
    assert not [metadata for metadata in early if "invalid_tool_calls" in metadata]


def test_a_reply_without_broken_calls_has_no_reasons() -> None:
    assert "invalid_tool_calls" not in whole(STREAMS["a call"]).response_metadata
    assert "invalid_tool_calls" not in merged(STREAMS["a call"]).response_metadata


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ARGUMENTS = st.dictionaries(TEXTS, st.none() | st.integers() | TEXTS | st.lists(TEXTS, max_size=2), max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> list[Answer]:
    """Any reply, cut anywhere: texts, thoughts and calls, the last of which may be cut off."""
    events: list[Answer] = []
    n_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "thought", "call", "refused"]), max_size=6)):
        if kind in ("text", "thought"):
            make: Any = TextDelta if kind == "text" else ReasoningDelta
            events += [make(piece) for piece in draw(st.lists(TEXTS, min_size=1, max_size=3))]
            continue
        text = json.dumps(draw(ARGUMENTS), ensure_ascii=draw(st.booleans()))
        cut = draw(st.integers(0, len(text))) if kind == "refused" else len(text)
        middle = draw(st.integers(0, cut))
        error = "cut off" if kind == "refused" else ""
        events += called(n_calls, text[:cut], text[:middle], text[middle:cut], error=error)
        n_calls += 1
    return stream(draw(st.sampled_from(["stop", "length", "tool_calls"])), *events)


@given(events=streams(), in_blocks=st.booleans())
def test_whatever_a_stream_says_its_chunks_add_up_to_it(events: list[Answer], in_blocks: bool) -> None:
    told, said, end = merged(events, in_blocks=in_blocks), whole(events, in_blocks=in_blocks), events[-1]
    assert isinstance(end, Finished)
    assert told.text == said.text == end.text
    assert told.tool_calls == said.tool_calls
    assert [c["id"] for c in told.invalid_tool_calls] == [call.id for call in end.invalid_tool_calls]
    assert told.response_metadata == said.response_metadata
    thoughts = [b["reasoning"] for b in told.content_blocks if b["type"] == "reasoning"]
    assert "".join(thoughts) == end.reasoning
    back, again = to_core([told, said])
    assert (back.content, back.reasoning) == (again.content, again.reasoning)
    assert [(call.id, call.name) for call in back.tool_calls] == [(call.id, call.name) for call in again.tool_calls]
    n = len(end.tool_calls)
    assert back.tool_calls[:n] == again.tool_calls[:n] == end.tool_calls


@given(events=streams(), in_blocks=st.booleans())
def test_the_v3_events_of_whatever_a_stream_says_have_the_same_calls(events: list[Answer], in_blocks: bool) -> None:
    end = events[-1]
    assert isinstance(end, Finished)
    told = list(chunks_to_events(iter(chunks_of(events, in_blocks=in_blocks))))
    done: list[Any] = [event["content"] for event in told if event["event"] == "content-block-finish"]
    calls = [(block["name"], block["args"]) for block in done if block["type"] == "tool_call"]
    assert calls == [(call.name, call.arguments) for call in end.tool_calls]
    assert [block["id"] for block in done if block["type"] == "invalid_tool_call"] == [
        call.id for call in end.invalid_tool_calls
    ]
    assert "".join(block["text"] for block in done if block["type"] == "text") == end.text
    assert "".join(block["reasoning"] for block in done if block["type"] == "reasoning") == end.reasoning


def test_a_call_that_is_cut_off_leaves_the_one_before_it_valid() -> None:
    told = merged(CUT["after a good one"])
    assert [(call["name"], call["args"]) for call in told.tool_calls] == [("tool0", {"x": 1})]
    assert [call["name"] for call in told.invalid_tool_calls] == ["tool1"]


def test_a_stream_that_is_cancelled_raises_with_all_there_is() -> None:
    call = Call(
        connect=lambda: pytest.fail("nothing is asked for"),
        model="m",
        prompt=(),
        options={},
        stream_usage=True,
        retry=RetryPolicy(0, restarts=False),
    )
    events = stream("cancelled", ReasoningDelta("hm"), TextDelta("so"), *called(0, "{}"), *called(1, "{", error="cut"))
    with pytest.raises(GenerationCancelled) as caught:
        [_answer(event, call) for event in events]  # type: ignore[arg-type]
    end, partial = events[-1], caught.value.partial
    assert isinstance(end, Finished)
    assert partial is not None
    assert (partial.text, partial.reasoning) == ("so", "hm")
    assert (partial.tool_calls, partial.invalid_tool_calls) == (end.tool_calls, end.invalid_tool_calls)
    assert partial.usage == USAGE


# -- usage and logprobs -----------------------------------------------------------------------------


def test_usage_counts_the_cached_tokens_as_input_and_the_thoughts_as_output() -> None:
    assert merged(STREAMS["two deltas"]).usage_metadata == {
        "input_tokens": 10,
        "output_tokens": 3,
        "total_tokens": 13,
        "input_token_details": {"cache_read": 7},
        "output_token_details": {"reasoning": 1},
    }


def test_usage_can_be_left_out_of_a_stream() -> None:
    assert merged(STREAMS["two deltas"], usage=False).usage_metadata is None


@pytest.mark.parametrize("name", ["logprobs", "thoughts and logprobs"])
def test_logprobs_have_the_shape_that_users_know_from_openai(name: str) -> None:
    content = merged(STREAMS[name]).response_metadata["logprobs"]["content"]
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
    assert end is not None
    assert end.text == ""
    assert end.generation_info is not None
    assert end.generation_info["finish_reason"] == "stop"
    assert end.generation_info["usage_metadata"]["total_tokens"] == 13
    told = generation_chunk(TextDelta("a"), "m", usage=True)
    assert told is not None
    assert told.generation_info is None
    assert generation_chunk(ReasoningDelta("hm"), "m", usage=True) is None
