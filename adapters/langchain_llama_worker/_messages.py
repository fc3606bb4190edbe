"""LangChain's messages as the worker's, all pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, ToolMessage

from langchain_llama_worker._cut import begun_arguments
from llama_worker import InvalidRequestError, Message, ToolCall, UnsupportedFeatureError

_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "ai": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TEXT = ("text", "text-plain")
_THOUGHTS = ("reasoning", "reasoning_content", "thinking", "redacted_thinking")
_CALLS = ("tool_call", "tool_use", "tool_call_chunk", "invalid_tool_call", "function_call")


def to_core(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain's messages as the worker's. Raises UnsupportedFeatureError for what is neither text nor call."""
    return [_message(message) for message in messages]


def _message(message: BaseMessage) -> Message:
    if isinstance(message, AIMessage):
        return _answer(message)
    if isinstance(message, ToolMessage):
        return _result(message)
    kind = message.role if isinstance(message, ChatMessage) else message.type.removesuffix("MessageChunk").lower()
    if kind not in _ROLES:
        raise InvalidRequestError("role", kind, f"the roles are {', '.join(_ROLES)}")
    return Message(role=_ROLES[kind], content=_text(_blocks(message)), name=message.name)  # type: ignore[arg-type]


def _result(message: ToolMessage) -> Message:
    """What a tool gave. No template knows a status, so a failure is said in words."""
    text = _text(_blocks(message))
    failed = message.status == "error" and not text.lstrip().lower().startswith("error")
    return Message(
        role="tool",
        content=f"Error: {text}" if failed else text,
        name=message.name,
        tool_call_id=message.tool_call_id,
    )


def _answer(message: AIMessage) -> Message:
    """What a model said, thought and called. Calls may be in the content, in `tool_calls`, or in both."""
    blocks = list(_blocks(message))
    rest = [block for block in blocks if block.get("type") not in (*_THOUGHTS, *_CALLS)]
    return Message(
        role="assistant",
        content=_text(rest),
        name=message.name,
        reasoning=_thoughts(message, blocks),
        tool_calls=tuple(_calls(message, blocks)),
    )


def _blocks(message: BaseMessage) -> Iterator[Mapping[str, Any]]:
    content = [message.content] if isinstance(message.content, str) else message.content
    for block in content:
        yield {"type": "text", "text": block} if isinstance(block, str) else block


def _text(blocks: Iterator[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> str:
    return "".join(map(_block_text, blocks))


def _block_text(block: Mapping[str, Any]) -> str:
    kind = block.get("type")
    if kind in _TEXT and isinstance(block.get("text"), str):
        return str(block["text"])
    raise UnsupportedFeatureError(f"a content block of type {kind!r}", "this model reads text; send text blocks only")


def _thoughts(message: AIMessage, blocks: Sequence[Mapping[str, Any]]) -> str | None:
    """In blocks, or where models without blocks have them. The template decides whether to show them again."""
    told = "".join(_thought(block) for block in blocks if block.get("type") in _THOUGHTS)
    aside = message.additional_kwargs.get("reasoning_content")
    return told or (aside if isinstance(aside, str) else None) or None


def _thought(block: Mapping[str, Any]) -> str:
    """LangChain's own form, or that of Anthropic, Bedrock or OpenAI. Encrypted thoughts are none."""
    inner = block.get("reasoning_content")
    parts = [block.get("reasoning"), block.get("thinking"), inner.get("text") if isinstance(inner, Mapping) else None]
    summary = block.get("summary")
    parts += [part.get("text") for part in summary if isinstance(part, Mapping)] if isinstance(summary, list) else []
    return "".join(part for part in parts if isinstance(part, str))


def _calls(message: AIMessage, blocks: Sequence[Mapping[str, Any]]) -> Iterator[ToolCall]:
    known = [*message.tool_calls, *message.invalid_tool_calls]
    for call in message.tool_calls:
        yield ToolCall(id=call["id"] or "", name=call["name"], arguments=call["args"])
    for broken in message.invalid_tool_calls:
        yield ToolCall(
            id=broken["id"] or "", name=broken["name"] or "unknown", arguments=begun_arguments(broken["args"] or "")
        )
    ids = {call["id"] for call in known}
    for block in blocks:
        if block.get("type") in _CALLS and not (known and block.get("id") in {*ids, None}):
            yield from _block_call(block, known=bool(known))


def _block_call(block: Mapping[str, Any], *, known: bool) -> Iterator[ToolCall]:
    """A call that only the content tells. A provider's own form of one that `tool_calls` has as well is passed over."""
    if block.get("type") in ("tool_call", "tool_use"):
        arguments = block["args"] if "args" in block else block.get("input") or {}
        yield ToolCall.model_validate({"id": block.get("id") or "", "name": block.get("name"), "arguments": arguments})
    elif not known:
        raise UnsupportedFeatureError(
            f"a content block of type {block.get('type')!r}", "give the calls of a message as its tool_calls"
        )
