"""Translations between LlamaIndex's messages and the worker's, all pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)

from llama_worker import Message, Reply, TextDelta, TokenLogprob, UnsupportedFeatureError

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


def to_core(messages: Sequence[ChatMessage]) -> list[Message]:
    """LlamaIndex's messages as the worker's. Raises UnsupportedFeatureError for what is not text."""
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> Message:
    if message.additional_kwargs.get("tool_calls"):
        raise UnsupportedFeatureError("a message with tool calls", "leave them out of the history or give them as text")
    return Message(role=_ROLES[message.role], content=_text(message.blocks), name=message.additional_kwargs.get("name"))


def _text(blocks: Iterable[ContentBlock]) -> str:
    # Joined as ChatMessage.content joins. Cache points are hints, and old thoughts no part of the conversation.
    return "\n".join(_block_text(block) for block in blocks if not isinstance(block, CachePoint | ThinkingBlock))


def _block_text(block: ContentBlock) -> str:
    if not isinstance(block, TextBlock):
        raise UnsupportedFeatureError(f"a {block.block_type} block", "this model reads text; send text blocks only")
    return block.text


def chat_response(reply: Reply) -> ChatResponse:
    return ChatResponse(message=_answer(reply.text), raw=_raw(reply), logprobs=_logprobs(reply.logprobs))


def completion_response(reply: Reply) -> CompletionResponse:
    return CompletionResponse(text=reply.text, raw=_raw(reply), logprobs=_logprobs(reply.logprobs))


class Transcript:
    """Turns the events of one stream into chunks, which carry the text so far and what is new in it.

    `logprobs` of a chunk belong to its delta. The last chunk has no new text and is the whole reply,
    with `raw` and all logprobs.
    """

    def __init__(self) -> None:
        self._text = ""

    def chat(self, event: TextDelta | Reply) -> ChatResponse:
        if isinstance(event, Reply):
            return chat_response(event).model_copy(update={"delta": ""})
        self._text += event.text
        return ChatResponse(message=_answer(self._text), delta=event.text, logprobs=_logprobs(event.logprobs))

    def completion(self, event: TextDelta | Reply) -> CompletionResponse:
        if isinstance(event, Reply):
            return completion_response(event).model_copy(update={"delta": ""})
        self._text += event.text
        return CompletionResponse(text=self._text, delta=event.text, logprobs=_logprobs(event.logprobs))


def _answer(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _raw(reply: Reply) -> dict[str, Any]:
    # TokenCountingHandler reads `usage` under these names, and guesses with another tokenizer without them.
    usage = {
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "total_tokens": reply.usage.total_tokens,
        "cached_tokens": reply.usage.cached_tokens,
    }
    return {"model": reply.model, "finish_reason": reply.finish_reason, "usage": usage}


def _logprobs(entries: Sequence[TokenLogprob]) -> list[list[LogProb]] | None:
    """For each token the sampled one, then the likeliest others; None when none were asked for."""
    return [_alternatives(entry) for entry in entries] or None


def _alternatives(entry: TokenLogprob) -> list[LogProb]:
    others = [(text, logprob) for token, text, logprob in entry.top if token != entry.token]
    return [_logprob(text, logprob) for text, logprob in [(entry.text, entry.logprob), *others]]


def _logprob(text: str, logprob: float) -> LogProb:
    return LogProb(token=text, logprob=logprob, bytes=list(text.encode("utf-8", "surrogatepass")))
