"""Replies and the events of a stream as LlamaIndex's responses, without a worker."""

import json

from llama_index.core.base.llms.types import ChatResponse, ThinkingBlock, ToolCallBlock
from llama_index.llms.llama_worker import LlamaWorkerLLM
from llama_index.llms.llama_worker._call import Delta
from llama_index.llms.llama_worker._replies import Transcript, chat_response

from llama_worker import (
    InvalidToolCall,
    ReasoningDelta,
    Reply,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
    Usage,
)

ADD = ToolCall(id="1", name="add", arguments={"a": 2, "who": "Grüße"})
CUT = InvalidToolCall(id="2", name="add", arguments='{"a": ', error="cut off")
USAGE = Usage(prompt_tokens=5, completion_tokens=9, reasoning_tokens=4)


def begun(index: int = 0, call_id: str = "1") -> list[Delta]:
    pieces = [ToolCallDelta(index=index, arguments=piece) for piece in ('{"a": 2, ', '"who": "Grü', 'ße"}')]
    return [ToolCallStarted(index=index, id=call_id, name="add"), *pieces]


THOUGHT: list[Delta] = [ReasoningDelta("I "), ReasoningDelta("add."), TextDelta("Ok"), TextDelta(".")]
STREAM: list[Delta] = [*THOUGHT, *begun(), ToolCallEnded(index=0, call=ADD)]
REPLY = Reply(text="Ok.", reasoning="I add.", tool_calls=(ADD,), finish_reason="tool_calls", usage=USAGE, model="m")


def chunks(*events: Delta | Reply) -> list[ChatResponse]:
    transcript = Transcript()
    return [transcript.chat(event) for event in events]


def types(response: ChatResponse) -> list[str]:
    return [block.block_type for block in response.message.blocks]


def test_blocks_come_as_thought_text_and_calls() -> None:
    response = chat_response(REPLY)
    assert types(response) == ["thinking", "text", "tool_call"]
    assert response.message.blocks[0] == ThinkingBlock(content="I add.", num_tokens=4)
    assert response.message.blocks[2] == ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs=ADD.arguments)


def test_a_reply_of_calls_has_no_text_and_one_of_nothing_has_an_empty_one() -> None:
    only = Reply(text="", tool_calls=(ADD,), finish_reason="tool_calls", usage=USAGE, model="m")
    assert chat_response(only).message.content is None
    nothing = Reply(text="", reasoning="Hm", finish_reason="stop", usage=USAGE, model="m")
    assert chat_response(nothing).message.content == ""


def test_calls_are_told_in_openais_form_too() -> None:
    """The readers of LlamaIndex's programs look there."""
    [entry] = chat_response(REPLY).message.additional_kwargs["tool_calls"]
    assert json.loads(entry["function"].pop("arguments")) == ADD.arguments
    assert entry == {"id": "1", "type": "function", "function": {"name": "add"}}


def test_a_message_is_plain_json() -> None:
    """Workflows save it."""
    for response in chunks(*STREAM, REPLY):
        assert json.loads(response.model_dump_json())["message"]["role"] == "assistant"


def test_usage_and_reason_are_raw() -> None:
    raw = chat_response(REPLY).raw
    assert raw["finish_reason"] == "tool_calls"
    assert raw["usage"]["reasoning_tokens"] == 4
    assert "invalid_tool_calls" not in raw


def test_deltas_join_to_what_the_message_says() -> None:
    seen = chunks(*STREAM, REPLY)
    assert all(chunk.delta is not None for chunk in seen)
    assert "".join(str(chunk.delta) for chunk in seen) == seen[-1].message.content == "Ok."
    assert [chunk.additional_kwargs.get("thinking_delta") for chunk in seen[:3]] == ["I ", "add.", None]
    contents = [chunk.message.content for chunk in seen]
    assert contents == ["", "", "Ok", "Ok.", "Ok.", "Ok.", "Ok.", "Ok.", "Ok.", "Ok."]


def test_a_chunk_keeps_what_it_said() -> None:
    """The message is cumulative, and each chunk has its own."""
    seen = chunks(*STREAM, REPLY)
    assert [types(chunk) for chunk in seen[:3]] == [["thinking", "text"]] * 3
    assert [len(chunk.message.additional_kwargs.get("tool_calls", ())) for chunk in seen] == [0] * 4 + [1] * 6
    written = [chunk.message.additional_kwargs["tool_calls"][0]["function"]["arguments"] for chunk in seen[4:9]]
    assert written == ["", '{"a": 2, ', '{"a": 2, "who": "Grü', '{"a": 2, "who": "Grüße"}', written[4]]
    assert json.loads(written[4]) == ADD.arguments


def test_a_call_is_a_block_when_it_is_complete(llm: LlamaWorkerLLM) -> None:
    """And before that it can be watched: each chunk says how far it has come."""
    seen = chunks(*STREAM, REPLY)
    assert ["tool_call" in types(chunk) for chunk in seen] == [False] * 8 + [True] * 2
    selected = [llm.get_tool_calls_from_response(chunk, error_on_no_tool_call=False) for chunk in seen]
    assert [[call.tool_kwargs for call in calls] for calls in selected[4:]] == [
        [{}],
        [{"a": 2}],
        [{"a": 2, "who": "Grü"}],
        [ADD.arguments],
        [ADD.arguments],
        [ADD.arguments],
    ]
    assert {call.tool_id for calls in selected for call in calls} == {"1"}


def test_a_call_that_is_cut_off_is_never_a_call(llm: LlamaWorkerLLM) -> None:
    started = ToolCallStarted(index=1, id="2", name="add")
    events = [started, ToolCallDelta(index=1, arguments='{"a": '), ToolCallEnded(index=1, call=CUT)]
    reply = Reply(text="", tool_calls=(ADD,), invalid_tool_calls=(CUT,), finish_reason="length", usage=USAGE, model="m")
    seen = chunks(*begun(), ToolCallEnded(index=0, call=ADD), *events, reply)
    assert [types(chunk).count("tool_call") for chunk in seen] == [0] * 4 + [1] * 5
    assert [len(llm.get_tool_calls_from_response(chunk)) for chunk in seen[4:]] == [1, 2, 2, 1, 1]
    assert seen[-1].raw["invalid_tool_calls"] == [{"id": "2", "name": "add", "arguments": '{"a": ', "error": "cut off"}]
    assert len(seen[-1].message.additional_kwargs["tool_calls"]) == 1


def test_a_completion_says_text_and_thoughts() -> None:
    transcript = Transcript()
    seen = [transcript.completion(event) for event in (*THOUGHT, REPLY)]
    assert [chunk.text for chunk in seen] == ["", "", "Ok", "Ok.", "Ok."]
    assert [chunk.delta for chunk in seen] == ["", "", "Ok", ".", ""]
    assert [chunk.additional_kwargs.get("thinking_delta") for chunk in seen] == ["I ", "add.", None, None, None]
