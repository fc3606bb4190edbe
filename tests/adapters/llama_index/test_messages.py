"""LlamaIndex's messages in the worker's words."""

import pytest
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    ContentBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.llms.llama_worker import LlamaWorkerLLM
from llama_index.llms.llama_worker._messages import to_core

from llama_worker import Message, UnsupportedFeatureError


@pytest.mark.parametrize("role", list(MessageRole))
def test_every_role_is_one_of_ours(role: MessageRole) -> None:
    special = {"developer": "system", "chatbot": "assistant", "model": "assistant", "function": "tool"}
    [message] = to_core([ChatMessage("x", role=role)])
    assert message == Message(role=special.get(role.value, role.value), content="x")  # type: ignore[arg-type]


def test_text_blocks_are_joined_as_llama_index_joins_them() -> None:
    message = ChatMessage(blocks=[TextBlock(text="one"), TextBlock(text="two")])
    assert to_core([message])[0].content == message.content == "one\ntwo"


def test_hints_and_old_thoughts_are_not_part_of_the_conversation() -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    message = ChatMessage(blocks=[ThinkingBlock(content="hm"), TextBlock(text="yes"), point])
    assert to_core([message])[0].content == "yes"


@pytest.mark.parametrize(
    "block",
    [ImageBlock(image=b"abc"), DocumentBlock(data=b"abc"), ToolCallBlock(tool_name="f", tool_kwargs={})],
    ids=lambda block: block.block_type,
)
def test_what_is_not_text_is_refused(block: ContentBlock) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"a {block.block_type} block"):
        to_core([ChatMessage(blocks=[block])])


def test_tool_calls_of_other_models_are_refused() -> None:
    message = ChatMessage("x", role="assistant", additional_kwargs={"tool_calls": [{"name": "f"}]})
    with pytest.raises(UnsupportedFeatureError, match="tool calls"):
        to_core([message])


def test_a_message_may_name_its_speaker() -> None:
    assert to_core([ChatMessage("x", additional_kwargs={"name": "ann"})])[0].name == "ann"


def test_the_messages_of_the_caller_stay_as_they_were(llm: LlamaWorkerLLM) -> None:
    messages = [ChatMessage(blocks=[TextBlock(text="one"), TextBlock(text="two")], role="developer")]
    before = [message.model_dump() for message in messages]
    llm.chat(messages)
    list(llm.stream_chat(messages))
    assert [message.model_dump() for message in messages] == before
