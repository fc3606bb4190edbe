"""The worker's replies as LangChain's results, whole or event by event, all pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import (
    ChatGeneration,
    ChatGenerationChunk,
    ChatResult,
    Generation,
    GenerationChunk,
    LLMResult,
)

from langchain_llama_worker._calls import Answer
from langchain_llama_worker._cut import spoiler
from langchain_llama_worker._params import PROVIDER
from llama_worker import (
    Finished,
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

Kind: TypeAlias = Literal["text", "reasoning", "call"]


def usage_metadata(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
        output_token_details=OutputTokenDetails(reasoning=usage.reasoning_tokens),
    )


def chat_result(reply: Reply, model: str, *, in_blocks: bool = False) -> ChatResult:
    """`in_blocks`: the content is LangChain's standard blocks (output_version="v1"), otherwise the text."""
    metadata = {
        **_labels(in_blocks),
        "model_name": model,
        **_refusals(reply.invalid_tool_calls),
        **_logprobs(reply.logprobs),
    }
    message = AIMessage(
        content=_content_blocks(reply) if in_blocks else reply.text,
        tool_calls=[tool_call(name=c.name, args=c.arguments, id=c.id) for c in reply.tool_calls],
        invalid_tool_calls=[_invalid(call) for call in reply.invalid_tool_calls],
        additional_kwargs={} if in_blocks else _aside(reply.reasoning),
        usage_metadata=usage_metadata(reply.usage),
        response_metadata=metadata,
    )
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=_ending(reply.finish_reason))])


def message_of(reply: Reply, *, in_blocks: bool) -> AIMessage:
    """`reply` as LangChain gives a message to its user."""
    generation = chat_result(reply, reply.model, in_blocks=in_blocks).generations[0]
    message = cast("AIMessage", generation.message)
    message.response_metadata = {**_ending(reply.finish_reason), **message.response_metadata}
    return message


def rest_of(reply: Reply, said: AIMessageChunk) -> AIMessageChunk:
    """The last chunk of a stream that told all of `reply` and then failed: `said` and it are `message_of(reply)`."""
    in_blocks = isinstance(said.content, list)
    n_told = len(said.response_metadata.get("logprobs", {}).get("content", ()))
    return AIMessageChunk(
        content=[] if in_blocks else "",
        usage_metadata=usage_metadata(reply.usage),
        response_metadata={
            **_labels(in_blocks),
            **_ending(reply.finish_reason),
            **_refusals(reply.invalid_tool_calls),
            **_logprobs(reply.logprobs[n_told:]),
        },
        chunk_position="last",
    )


def _content_blocks(reply: Reply) -> list[str | dict[Any, Any]]:
    blocks: list[dict[Any, Any]] = [{"type": "reasoning", "reasoning": reply.reasoning}] if reply.reasoning else []
    blocks += [{"type": "text", "text": reply.text}] if reply.text else []
    blocks += [dict(tool_call(name=call.name, args=call.arguments, id=call.id)) for call in reply.tool_calls]
    return [*blocks, *(dict(_invalid(call)) for call in reply.invalid_tool_calls)]


def _invalid(call: InvalidToolCall) -> Any:
    return invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=call.error)


def _refusals(calls: Sequence[InvalidToolCall]) -> dict[str, Any]:
    """Why calls are none, without what they say: LangChain's streams lose the `error` of an invalid call."""
    return {"invalid_tool_calls": [{"id": c.id, "name": c.name, "error": c.error} for c in calls]} if calls else {}


def _aside(reasoning: str) -> dict[str, Any]:
    """Where LangChain looks for the thoughts of a message whose content is text."""
    return {"reasoning_content": reasoning} if reasoning else {}


def _labels(in_blocks: bool) -> dict[str, Any]:
    """What every chunk may say: LangChain does not join these."""
    return {"model_provider": PROVIDER, **({"output_version": "v1"} if in_blocks else {})}


class ChatChunks:
    """Turns the events of one stream into chunks that add up to what `chat_result` gives.

    Chunks are merged by adding: strings are joined, numbers summed, and what has the same index becomes one. So
    each value goes out once, text and calls never go out together, and texts, thoughts and calls are counted as
    one line of blocks: the index of a call is its place there, and with `in_blocks` every block has its own.
    """

    def __init__(self, model: str, *, usage: bool, in_blocks: bool = False) -> None:
        self._labels = _labels(in_blocks)
        self._once: dict[str, Any] = {"model_name": model}
        self._usage = usage
        self._in_blocks = in_blocks
        self._place = -1
        self._kind: Kind | None = None
        self._arguments = ""
        self._n_logprobs = 0
        self._in_step = True

    def chunk(self, event: Answer) -> ChatGenerationChunk | None:
        """The chunk that tells `event`; None if all of it was told before."""
        match event:
            case TextDelta():
                return self._text(event)
            case ReasoningDelta():
                return self._reasoning(event)
            case ToolCallStarted() | ToolCallDelta():
                return self._call(event)
            case ToolCallEnded():
                return self._call_ended(event)
            case Finished():
                return self._end(event)

    def _text(self, event: TextDelta) -> ChatGenerationChunk:
        self._go_to("text")
        logprobs = self._fresh_logprobs(event.logprobs) if self._in_step else {}
        return self._made(event.text, {"type": "text", "text": event.text}, logprobs)

    def _reasoning(self, event: ReasoningDelta) -> ChatGenerationChunk:
        self._go_to("reasoning")
        self._in_step = False
        block = {"type": "reasoning", "reasoning": event.text}
        return self._made("", block, additional_kwargs={} if self._in_blocks else _aside(event.text))

    def _call(self, event: ToolCallStarted | ToolCallDelta) -> ChatGenerationChunk:
        self._in_step = False
        if isinstance(event, ToolCallStarted):
            self._go_to("call", anew=True)
            self._arguments = ""
            return self._call_piece("", name=event.name, call_id=event.id)
        self._arguments += event.arguments
        return self._call_piece(event.arguments)

    def _call_ended(self, event: ToolCallEnded) -> ChatGenerationChunk | None:
        return None if isinstance(event.call, ToolCall) else self._call_piece(spoiler(self._arguments))

    def _call_piece(self, arguments: str, name: str | None = None, call_id: str | None = None) -> ChatGenerationChunk:
        piece = tool_call_chunk(name=name, args=arguments, id=call_id, index=self._place)
        return self._made("", dict(piece), tool_call_chunks=[piece])

    def _end(self, event: Finished) -> ChatGenerationChunk:
        # The end has all logprobs: what no delta carried goes out with it.
        usage = usage_metadata(event.usage) if self._usage else None
        metadata = {
            **_refusals(event.invalid_tool_calls),
            **self._fresh_logprobs(event.logprobs[self._n_logprobs :]),
        }
        chunk = self._made("", None, metadata, usage_metadata=usage)
        chunk.message.chunk_position = "last"  # type: ignore[attr-defined]
        chunk.generation_info = _ending(event.reason)
        return chunk

    def _go_to(self, kind: Kind, *, anew: bool = False) -> None:
        if anew or kind != self._kind:
            self._kind, self._place = kind, self._place + 1

    def _made(
        self, text: str, block: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None = None, **fields: Any
    ) -> ChatGenerationChunk:
        """A chunk of `text`, or of `block` at its place."""
        told = {**self._labels, **self._once, **(metadata or {})}
        self._once = {}
        content: Any = text
        if self._in_blocks:
            content = [] if block is None else [{**block, "index": self._place}]
        return ChatGenerationChunk(message=AIMessageChunk(content=content, response_metadata=told, **fields))

    def _fresh_logprobs(self, fresh: Sequence[TokenLogprob]) -> dict[str, Any]:
        # Thoughts and calls go out without theirs; from the first on, the rest waits for the end to keep the order.
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


def generation_chunk(event: Answer, model: str, *, usage: bool) -> GenerationChunk | None:
    """Everything but the text goes out with the end, so that nothing is merged twice. A completion has no more."""
    if isinstance(event, TextDelta):
        return GenerationChunk(text=event.text)
    if not isinstance(event, Finished):
        return None
    info = _info(event, event.reason, model)
    if not usage:
        del info["usage_metadata"]
    return GenerationChunk(text="", generation_info=info)


def _info(end: Reply | Finished, reason: str, model: str) -> dict[str, Any]:
    shared = {"model_name": model, "model_provider": PROVIDER, "usage_metadata": usage_metadata(end.usage)}
    return {**_ending(reason), **shared, **_logprobs(end.logprobs)}


def _ending(reason: str) -> dict[str, Any]:
    return {"finish_reason": reason}


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """In OpenAI's shape, which users of LangChain know; {} when none were asked for."""
    content = [
        {**_entry(e.text, e.logprob), "top_logprobs": [_entry(text, logprob) for _, text, logprob in e.top]}
        for e in entries
    ]
    return {"logprobs": {"content": content}} if content else {}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode("utf-8", "surrogatepass")), "logprob": logprob}
