"""Where the text of a ReAct agent's model ends: before what the agent has to say."""

from typing import Any

import pytest
from llama_index.core.agent.react import ReActChatFormatter
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.llama_worker import LlamaWorkerLLM
from llama_index.llms.llama_worker._react import teaches_react

from .conftest import HELLO
from .scripts import SONG_TOOL, scripted

REPLY = "Thought: Hm.\nObservation: 3"
TAUGHT = ReActChatFormatter().format([SONG_TOOL], HELLO)


def said(llm: LlamaWorkerLLM, messages: list[ChatMessage], **kwargs: Any) -> str:
    text = str(llm.chat(messages, **kwargs).message.content)
    assert [*llm.stream_chat(messages, **kwargs)][-1].message.content == text
    return text


def test_the_prompt_of_an_agent_is_known() -> None:
    with_context = ReActChatFormatter.from_defaults(context="Be brief.").format([SONG_TOOL], HELLO)
    assert teaches_react(TAUGHT)
    assert teaches_react(with_context)
    assert not any(teaches_react(messages) for messages in ([], HELLO, [ChatMessage("Observation: it rains.")]))


@pytest.mark.parametrize(
    ("react_stop", "messages", "text"),
    [
        (None, TAUGHT, "Thought: Hm.\n"),
        (None, HELLO, REPLY),
        (True, HELLO, "Thought: Hm.\n"),
        (False, TAUGHT, REPLY),
    ],
    ids=["agent", "chat", "always", "never"],
)
def test_a_chat_ends_there_if_its_prompt_says_so(react_stop: Any, messages: list[ChatMessage], text: str) -> None:
    with scripted(REPLY, react_stop=react_stop) as llm:
        assert said(llm, messages) == text


def test_other_stops_count_as_well() -> None:
    with scripted(REPLY, stop=["Hm"]) as llm:
        assert said(llm, TAUGHT) == "Thought: "
        assert said(llm, TAUGHT, stop=[".\n"]) == "Thought: Hm"
        assert llm.stop == ("Hm",)


def test_a_chat_with_tools_does_not_end_there() -> None:
    with scripted(REPLY, react_stop=True) as llm:
        assert llm.chat_with_tools([SONG_TOOL], "x").message.content == REPLY
