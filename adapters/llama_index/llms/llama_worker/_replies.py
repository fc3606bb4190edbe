"""The worker's replies as LlamaIndex's responses, whole or event by event, all pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.llms.llama_worker._call import Delta
from llama_index.llms.llama_worker._tools import openai_call

from llama_worker import (
    ReasoningDelta,
    Reply,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)


def chat_response(reply: Reply) -> ChatResponse:
    message = _answer(reply.text, reply.reasoning, reply.tool_calls, num_tokens=reply.usage.reasoning_tokens)
    return ChatResponse(message=message, raw=_raw(reply), logprobs=_logprobs(reply.logprobs))


def completion_response(reply: Reply) -> CompletionResponse:
    return CompletionResponse(text=reply.text, raw=_raw(reply), logprobs=_logprobs(reply.logprobs))


class Transcript:
    """Turns the events of one stream into chunks, which carry all that was said so far and what is new in it.

    `logprobs` of a chunk belong to its delta, which is "" for a chunk that brings no text. What is new of a thought
    is `additional_kwargs["thinking_delta"]`. A call becomes a ToolCallBlock when it is complete; while it is
    written it stands in `message.additional_kwargs["tool_calls"]` only, which has all calls in OpenAI's form.
    The last chunk has nothing new and is the whole reply, with `raw` and all logprobs.
    """

    def __init__(self) -> None:
        self._text = ""
        self._reasoning = ""
        self._calls: list[ToolCall] = []
        self._open: ToolCallStarted | None = None
        self._arguments = ""

    def chat(self, event: Delta | Reply) -> ChatResponse:
        if isinstance(event, Reply):
            return chat_response(event).model_copy(update={"delta": ""})
        self._take(event)
        return ChatResponse(message=self._message(), **_news(event))

    def completion(self, event: Delta | Reply) -> CompletionResponse:
        if isinstance(event, Reply):
            return completion_response(event).model_copy(update={"delta": ""})
        self._take(event)
        return CompletionResponse(text=self._text, **_news(event))

    def _take(self, event: Delta) -> None:
        match event:
            case TextDelta():
                self._text += event.text
            case ReasoningDelta():
                self._reasoning += event.text
            case ToolCallStarted():
                self._open, self._arguments = event, ""
            case ToolCallDelta():
                self._arguments += event.arguments
            case ToolCallEnded():
                self._open = None
                self._calls += [event.call] if isinstance(event.call, ToolCall) else []

    def _message(self) -> ChatMessage:
        begun = [] if self._open is None else [openai_call(self._open.id, self._open.name, self._arguments)]
        return _answer(self._text, self._reasoning, self._calls, begun)


def _news(event: Delta) -> dict[str, Any]:
    """What a chunk says beside its message."""
    match event:
        case TextDelta():
            return {"delta": event.text, "logprobs": _logprobs(event.logprobs)}
        case ReasoningDelta():
            return {"delta": "", "additional_kwargs": {"thinking_delta": event.text}}
    return {"delta": ""}


def _answer(
    text: str,
    reasoning: str,
    calls: Sequence[ToolCall],
    begun: Sequence[dict[str, Any]] = (),
    num_tokens: int | None = None,
) -> ChatMessage:
    """Blocks in the order in which LlamaIndex wants them. A reply that only calls has no text, not an empty one."""
    blocks: list[ContentBlock] = []
    if reasoning:
        blocks.append(ThinkingBlock(content=reasoning, num_tokens=num_tokens))
    if text or not (calls or begun):
        blocks.append(TextBlock(text=text))
    blocks += [ToolCallBlock(tool_call_id=c.id, tool_name=c.name, tool_kwargs=c.arguments) for c in calls]
    entries = [*(openai_call(call.id, call.name, call.arguments) for call in calls), *begun]
    return ChatMessage(
        role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs={"tool_calls": entries} if entries else {}
    )


def _raw(reply: Reply) -> dict[str, Any]:
    # TokenCountingHandler reads `usage` under these names, and guesses with another tokenizer without them.
    usage = {
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "total_tokens": reply.usage.total_tokens,
        "cached_tokens": reply.usage.cached_tokens,
        "reasoning_tokens": reply.usage.reasoning_tokens,
    }
    raw: dict[str, Any] = {"model": reply.model, "finish_reason": reply.finish_reason, "usage": usage}
    if reply.invalid_tool_calls:
        raw["invalid_tool_calls"] = [asdict(call) for call in reply.invalid_tool_calls]
    return raw


def _logprobs(entries: Sequence[TokenLogprob]) -> list[list[LogProb]] | None:
    """For each token the sampled one, then the likeliest others; None when none were asked for."""
    return [_alternatives(entry) for entry in entries] or None


def _alternatives(entry: TokenLogprob) -> list[LogProb]:
    others = [(text, logprob) for token, text, logprob in entry.top if token != entry.token]
    return [_logprob(text, logprob) for text, logprob in [(entry.text, entry.logprob), *others]]


def _logprob(text: str, logprob: float) -> LogProb:
    return LogProb(token=text, logprob=logprob, bytes=list(text.encode("utf-8", "surrogatepass")))
