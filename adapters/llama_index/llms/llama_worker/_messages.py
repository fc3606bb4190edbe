"""LlamaIndex's messages in the worker's words, all pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    DocumentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.llms.llama_worker._tools import calls_of

from llama_worker import Message, ToolCall, UnsupportedFeatureError

_ROLES: dict[MessageRole, Literal["system", "user", "assistant", "tool"]] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
_NOT_SAID = (CachePoint, ThinkingBlock, ToolCallBlock)
"""Blocks that are no part of a message's text: hints, thoughts, and calls, which go beside it."""


def to_core(messages: Sequence[ChatMessage]) -> list[Message]:
    """LlamaIndex's messages as the worker's.

    Raises UnsupportedFeatureError for what is not text, InvalidRequestError for what is no tool call.
    """
    open_calls = _OpenCalls()
    return [_message(message, open_calls) for message in messages]


class _OpenCalls:
    """The calls of a conversation so far, and which of them nobody has answered yet."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._unanswered: list[str] = []

    def add(self, calls: Iterable[ToolCall]) -> None:
        for call in calls:
            self._names[call.id] = call.name
            self._unanswered.append(call.id)

    def answer(self, call_id: str | None) -> tuple[str | None, str | None]:
        """The id and the name of the call that a result is for. A result that does not say it is for the oldest."""
        known = call_id or next(iter(self._unanswered), None)
        if known in self._unanswered:
            self._unanswered.remove(known)
        return known, self._names.get(known or "")


def _message(message: ChatMessage, open_calls: _OpenCalls) -> Message:
    role, text, name = _ROLES[message.role], _text(message.blocks), message.additional_kwargs.get("name")
    if role == "tool":
        # LlamaIndex tells a result's call by its id alone, and there are templates that want the name.
        call_id, called = open_calls.answer(message.additional_kwargs.get("tool_call_id"))
        return Message(role=role, content=text, name=name or called, tool_call_id=call_id)
    if role != "assistant":
        return Message(role=role, content=text, name=name)
    calls = tuple(call.core for call in calls_of(message))
    open_calls.add(calls)
    return Message(role=role, content=text, name=name, reasoning=_reasoning(message.blocks), tool_calls=calls)


def _reasoning(blocks: Iterable[ContentBlock]) -> str | None:
    return "\n".join(block.content for block in blocks if isinstance(block, ThinkingBlock) and block.content) or None


def _text(blocks: Iterable[ContentBlock]) -> str:
    # Joined as ChatMessage.content joins.
    return "\n".join(_block_text(block) for block in blocks if not isinstance(block, _NOT_SAID))


def _block_text(block: ContentBlock) -> str:
    match block:
        case TextBlock():
            return block.text
        case CitableBlock():
            return _text(block.content)
        case CitationBlock():
            return _block_text(block.cited_content)
        case DocumentBlock(data=bytes()) if (block.document_mimetype or "").startswith("text/"):
            return str(block.resolve_document().read().decode("utf-8", "replace"))
        case DocumentBlock():
            raise UnsupportedFeatureError("a document block", "give its data and a text document_mimetype, or its text")
    raise UnsupportedFeatureError(f"a {block.block_type} block", "this model reads text; send text blocks only")
