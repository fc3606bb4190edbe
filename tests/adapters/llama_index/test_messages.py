"""LlamaIndex's messages in the worker's words."""

import pytest
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.llms.llama_worker import LlamaWorkerLLM
from llama_index.llms.llama_worker._messages import to_core

from llama_worker import InvalidRequestError, Message, ToolCall, UnsupportedFeatureError


@pytest.mark.parametrize("role", list(MessageRole))
def test_every_role_is_one_of_ours(role: MessageRole) -> None:
    special = {"developer": "system", "chatbot": "assistant", "model": "assistant", "function": "tool"}
    [message] = to_core([ChatMessage("x", role=role)])
    assert message == Message(role=special.get(role.value, role.value), content="x")  # type: ignore[arg-type]


def test_text_blocks_are_joined_as_llama_index_joins_them() -> None:
    message = ChatMessage(blocks=[TextBlock(text="one"), TextBlock(text="two")])
    assert to_core([message])[0].content == message.content == "one\ntwo"


def test_hints_are_no_part_of_the_conversation() -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    assert to_core([ChatMessage(blocks=[TextBlock(text="yes"), point])])[0].content == "yes"


def test_a_thought_is_the_templates_to_replay_and_no_text() -> None:
    message = ChatMessage(blocks=[ThinkingBlock(content="hm"), TextBlock(text="yes")], role="assistant")
    assert to_core([message]) == [Message(role="assistant", content="yes", reasoning="hm")]
    assert to_core([message.model_copy(update={"role": MessageRole.USER})])[0].reasoning is None


def test_an_empty_thought_is_none() -> None:
    [message] = to_core([ChatMessage(blocks=[ThinkingBlock(), TextBlock(text="yes")], role="assistant")])
    assert message.reasoning is None


def test_text_in_other_blocks_is_text() -> None:
    document = DocumentBlock(data="Grüße".encode(), document_mimetype="text/plain")
    cited = CitationBlock(cited_content="cited", source="s", title="t", additional_location_info={})
    citable = CitableBlock(title="t", source="s", content=[TextBlock(text="citable"), document])
    assert to_core([ChatMessage(blocks=[citable, cited])])[0].content == "citable\nGrüße\ncited"


@pytest.mark.parametrize(
    "block",
    [
        ImageBlock(image=b"abc"),
        DocumentBlock(data=b"abc"),
        DocumentBlock(url="https://example.org/a.txt", document_mimetype="text/plain"),
        CitableBlock(title="t", source="s", content=[ImageBlock(image=b"abc")]),
    ],
    ids=["image", "document of no type", "document elsewhere", "image in a citable"],
)
def test_what_is_not_text_is_refused(block: ContentBlock) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"a (image|document) block"):
        to_core([ChatMessage(blocks=[block])])


ADD = ToolCall(id="1", name="add", arguments={"a": 2})
BLOCK = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs={"a": 2})
OPENAI = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


@pytest.mark.parametrize(
    "message",
    [
        ChatMessage(blocks=[BLOCK], role="assistant"),
        ChatMessage(blocks=[BLOCK.model_copy(update={"tool_kwargs": '{"a": 2}'})], role="assistant"),
        ChatMessage(blocks=[BLOCK], role="assistant", additional_kwargs={"tool_calls": [OPENAI]}),
        ChatMessage(role="assistant", additional_kwargs={"tool_calls": [OPENAI]}),
        ChatMessage(
            role="assistant",
            additional_kwargs={"tool_calls": [ToolSelection(tool_id="1", tool_name="add", tool_kwargs={"a": 2})]},
        ),
        ChatMessage(
            role="assistant",
            additional_kwargs={"tool_calls": [{"tool_id": "1", "tool_name": "add", "tool_kwargs": {"a": 2}}]},
        ),
    ],
    ids=["block", "block of text", "both", "OpenAI", "ToolSelection", "ToolSelection from JSON"],
)
def test_a_call_comes_in_many_forms(message: ChatMessage) -> None:
    assert to_core([message]) == [Message(role="assistant", content="", tool_calls=(ADD,))]


@pytest.mark.parametrize(
    ("written", "tried"),
    [
        ('{"a": 2, "b": "x', {"a": 2, "b": "x"}),
        ('{"a": 2, "b', {"a": 2}),
        ('{"a": ', {}),
        ("{", {}),
        ("", {}),
        (" ", {}),
        ('"', {}),
        ("nothing", {"arguments": "nothing"}),
        ("[1]", {"arguments": "[1]"}),
        ("{'a': 2}", {"arguments": "{'a': 2}"}),
    ],
)
def test_a_call_that_was_cut_off_shows_what_was_tried(written: str, tried: dict[str, object]) -> None:
    """Another integration stored it, and the conversation has to go on."""
    half = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs=written)
    openai = {**OPENAI, "function": {"name": "add", "arguments": written}}
    told = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [openai]})
    for message in (ChatMessage(blocks=[half], role="assistant"), told):
        assert to_core([message])[0].tool_calls == (ToolCall(id="1", name="add", arguments=tried),)


def test_a_call_may_be_cut_off_in_its_name() -> None:
    half = ChatMessage(blocks=[ToolCallBlock(tool_name="", tool_kwargs="")], role="assistant")
    assert to_core([half])[0].tool_calls == (ToolCall(id="call_0", name="unknown", arguments={}),)


def test_arguments_may_be_nested_deeper_than_anyone_reads() -> None:
    deep = '{"a":' * 100_000
    half = ChatMessage(blocks=[ToolCallBlock(tool_name="add", tool_kwargs=deep)], role="assistant")
    assert to_core([half])[0].tool_calls[0].arguments == {"arguments": deep}


@pytest.mark.parametrize("entry", ["add", 7, {}, {"function": {"arguments": "{}"}}, {"name": "f", "arguments": 3}])
def test_what_is_no_call_is_refused(entry: object) -> None:
    with pytest.raises(InvalidRequestError, match="tool_calls"):
        to_core([ChatMessage(role="assistant", additional_kwargs={"tool_calls": [entry]})])


def result(text: str, **kwargs: object) -> ChatMessage:
    return ChatMessage(text, role="tool", additional_kwargs=kwargs)


def calling(*ids: str | None) -> ChatMessage:
    blocks = [ToolCallBlock(tool_call_id=call_id, tool_name=f"tool {i}") for i, call_id in enumerate(ids)]
    return ChatMessage(blocks=blocks, role="assistant")


def test_the_name_of_a_result_is_that_of_its_call() -> None:
    """LlamaIndex tells the id alone, and there are templates that write the name."""
    messages = to_core([calling("a", "b"), result("2", tool_call_id="b"), result("1", tool_call_id="a")])
    assert [(m.tool_call_id, m.name) for m in messages[1:]] == [("b", "tool 1"), ("a", "tool 0")]


def test_the_name_of_a_result_is_that_of_the_latest_call_with_its_id() -> None:
    """Ollama's ids are the names of the tools, so they come again."""
    other = ChatMessage(blocks=[ToolCallBlock(tool_call_id="a", tool_name="other")], role="assistant")
    messages = to_core([calling("a"), result("1", tool_call_id="a"), other, result("2", tool_call_id="a")])
    assert [m.name for m in messages if m.role == "tool"] == ["tool 0", "other"]


def test_results_without_ids_answer_the_calls_in_turn() -> None:
    messages = to_core([calling("a", None), result("1"), result("2"), result("3")])
    assert [(m.tool_call_id, m.name) for m in messages[1:]] == [("a", "tool 0"), ("call_1", "tool 1"), (None, None)]


def test_a_result_may_name_its_tool() -> None:
    assert to_core([result("1", name="weigh", tool_call_id="x")])[0].name == "weigh"


def test_a_result_that_was_returned_directly_is_an_answer() -> None:
    """A FunctionAgent repeats it as the assistant's message, with the id of the call."""
    message = ChatMessage("80 kg", role="assistant", additional_kwargs={"tool_call_id": "a"})
    assert to_core([message]) == [Message(role="assistant", content="80 kg")]


def test_a_message_may_name_its_speaker() -> None:
    assert to_core([ChatMessage("x", additional_kwargs={"name": "ann"})])[0].name == "ann"


def test_the_messages_of_the_caller_stay_as_they_were(llm: LlamaWorkerLLM) -> None:
    messages = [ChatMessage(blocks=[TextBlock(text="one"), TextBlock(text="two")], role="developer")]
    before = [message.model_dump() for message in messages]
    llm.chat(messages)
    list(llm.stream_chat(messages))
    assert [message.model_dump() for message in messages] == before
