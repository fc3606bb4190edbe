"""One LLM event of LlamaIndex around each public call.

Its decorators report the keyword arguments of what they wrap, so what is run comes as a closure: telemetry
sees the caller's own keywords and nothing of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM

T = TypeVar("T")
Keywords = Mapping[str, Any]


def observed_chat(llm: LLM, messages: Sequence[ChatMessage], keywords: Keywords, run: Callable[[], T]) -> T:
    @llm_chat_callback()
    def chat(_llm: LLM, _messages: Sequence[ChatMessage], **_: Any) -> T:
        return run()

    result: T = chat(llm, messages, **keywords)
    return result


async def aobserved_chat(
    llm: LLM, messages: Sequence[ChatMessage], keywords: Keywords, run: Callable[[], Awaitable[T]]
) -> T:
    @llm_chat_callback()
    async def achat(_llm: LLM, _messages: Sequence[ChatMessage], **_: Any) -> T:
        return await run()

    result: T = await achat(llm, messages, **keywords)
    return result


def observed_completion(llm: LLM, prompt: str, keywords: Keywords, run: Callable[[], T]) -> T:
    @llm_completion_callback()
    def complete(_llm: LLM, _prompt: str, **_: Any) -> T:
        return run()

    result: T = complete(llm, prompt, **keywords)
    return result


async def aobserved_completion(llm: LLM, prompt: str, keywords: Keywords, run: Callable[[], Awaitable[T]]) -> T:
    @llm_completion_callback()
    async def acomplete(_llm: LLM, _prompt: str, **_: Any) -> T:
        return await run()

    result: T = await acomplete(llm, prompt, **keywords)
    return result
