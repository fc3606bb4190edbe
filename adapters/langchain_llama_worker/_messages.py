"""Translations between LangChain's messages and the worker's, all pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import (
    ChatGeneration,
    ChatGenerationChunk,
    ChatResult,
    Generation,
    GenerationChunk,
    LLMResult,
)

from langchain_llama_worker._calls import Answer
from langchain_llama_worker._params import PROVIDER
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


def to_core(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain's messages as the worker's. Raises UnsupportedFeatureError for what is not text."""
    return [_message(message) for message in messages]


def _message(message: BaseMessage) -> Message:
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        raise UnsupportedFeatureError("a message with tool calls", "leave them out of the history or give them as text")
    # A streamed message is an answer as well: its type is "AIMessageChunk".
    kind = message.role if isinstance(message, ChatMessage) else message.type.removesuffix("MessageChunk").lower()
    if kind not in _ROLES:
        raise InvalidRequestError("role", kind, f"the roles are {', '.join(_ROLES)}")
    return Message(role=_ROLES[kind], content=_text(message.content), name=message.name)  # type: ignore[arg-type]


def _text(content: str | Iterable[str | dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(map(_block_text, content))


def _block_text(block: str | dict[str, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind in _TEXT and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind in _THOUGHTS:
        return ""  # what a model thought on an earlier turn is not part of the conversation
    raise UnsupportedFeatureError(f"a content block of type {kind!r}", "this model reads text; send text blocks only")


def usage_metadata(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """In OpenAI's shape, which users of LangChain know; {} when none were asked for."""
    content = [
        {**_entry(e.text, e.logprob), "top_logprobs": [_entry(text, logprob) for _, text, logprob in e.top]}
        for e in entries
    ]
    return {"logprobs": {"content": content}} if content else {}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode("utf-8", "surrogatepass")), "logprob": logprob}


def chat_result(reply: Reply, model: str) -> ChatResult:
    metadata = {"model_name": model, "model_provider": PROVIDER, **_logprobs(reply.logprobs)}
    usage = usage_metadata(reply.usage)
    message = AIMessage(content=reply.text, usage_metadata=usage, response_metadata=metadata)
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=_ending(reply.finish_reason))])


class ChatChunks:
    """Turns the events of one stream into chunks that add up to what `chat_result` gives.

    Chunks are merged by adding: strings are joined and numbers summed. So each value goes out once, and
    only the provider's name, which LangChain exempts, on every chunk.
    """

    def __init__(self, model: str, *, usage: bool) -> None:
        self._once: dict[str, Any] = {"model_name": model}
        self._usage = usage
        self._n_logprobs = 0

    def chunk(self, event: Answer) -> ChatGenerationChunk:
        metadata = {**self._once, "model_provider": PROVIDER, **self._fresh_logprobs(event)}
        self._once = {}
        if isinstance(event, TextDelta):
            return ChatGenerationChunk(message=AIMessageChunk(content=event.text, response_metadata=metadata))
        message = AIMessageChunk(
            content="",
            usage_metadata=usage_metadata(event.usage) if self._usage else None,
            response_metadata=metadata,
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message, generation_info=_ending(event.reason))

    def _fresh_logprobs(self, event: Answer) -> dict[str, Any]:
        # The end has all entries: what no delta carried, because it made no text, goes out with it.
        fresh = event.logprobs[self._n_logprobs :] if isinstance(event, Finished) else event.logprobs
        self._n_logprobs += len(fresh)
        return _logprobs(fresh)


def llm_result(replies: Sequence[Reply], model: str) -> LLMResult:
    """One generation for each reply, in order, and the sum of their usage."""
    generations = [[Generation(text=r.text, generation_info=_info(r, r.finish_reason, model))] for r in replies]
    total = {
        "prompt_tokens": sum(reply.usage.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.usage.completion_tokens for reply in replies),
        "total_tokens": sum(reply.usage.total_tokens for reply in replies),
    }
    return LLMResult(generations=generations, llm_output={"token_usage": total, "model_name": model})


def generation_chunk(event: Answer, model: str, *, usage: bool) -> GenerationChunk:
    """Everything but the text goes out with the end, so that nothing is merged twice."""
    if isinstance(event, TextDelta):
        return GenerationChunk(text=event.text)
    info = _info(event, event.reason, model)
    if not usage:
        del info["usage_metadata"]
    return GenerationChunk(text="", generation_info=info)


def _info(end: Reply | Finished, reason: str, model: str) -> dict[str, Any]:
    shared = {"model_name": model, "model_provider": PROVIDER, "usage_metadata": usage_metadata(end.usage)}
    return {**_ending(reason), **shared, **_logprobs(end.logprobs)}


def _ending(reason: str) -> dict[str, Any]:
    return {"finish_reason": reason}
