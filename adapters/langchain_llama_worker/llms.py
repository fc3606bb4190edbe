"""LlamaWorkerLLM: a local GGUF model as a LangChain completion model; prompts are not templated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import GenerationChunk, LLMResult
from pydantic import ConfigDict

from langchain_llama_worker._calls import Call, aevents, agenerate, events
from langchain_llama_worker._errors import mapped_errors
from langchain_llama_worker._loading import make_loadable
from langchain_llama_worker._model import GenerationFields
from langchain_llama_worker._replies import generation_chunk, llm_result
from langchain_llama_worker._threads import Threaded
from llama_worker import Reply


class LlamaWorkerLLM(GenerationFields, Threaded, BaseLLM):
    """A completion model on a llama.cpp worker thread of this process.

    Takes the keywords of ChatLlamaWorker and keeps its promises. The prompts of a batch are submitted
    together and generated in parallel; when one fails the others are cancelled and its error is raised.
    """

    model_config = ConfigDict(extra="forbid")

    @property
    def _llm_type(self) -> str:
        return "llama-worker"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        calls = [self._text_call(prompt, stop, kwargs, run_manager) for prompt in prompts]
        return llm_result(_all_replies(calls), self._named(calls))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        calls = [self._text_call(prompt, stop, kwargs, run_manager) for prompt in prompts]
        return llm_result(await _all_replies_async(calls), self._named(calls))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        call = self._text_call(prompt, stop, kwargs, run_manager)
        with closing(events(call)) as answers:
            for event in answers:
                chunk = generation_chunk(event, call.model, usage=call.stream_usage)
                if chunk is None:
                    continue
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        call = self._text_call(prompt, stop, kwargs, run_manager)
        async with aclosing(aevents(call)) as answers:
            async for event in answers:
                chunk = generation_chunk(event, call.model, usage=call.stream_usage)
                if chunk is None:
                    continue
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of `text` in the model's vocabulary. Never waits for a generation."""
        return self._tokens(text) if self.custom_get_token_ids is None else super().get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """How many tokens `text` has in the model's vocabulary."""
        return len(self.get_token_ids(text))

    def _text_call(self, prompt: str, stop: list[str] | None, kwargs: dict[str, Any], run: Any = None) -> Call:
        with mapped_errors():
            return self._call(prompt, stop, kwargs, run)

    def _named(self, calls: Sequence[Call]) -> str:
        return calls[0].model if calls else self._model_name

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing_params("llm", stop, kwargs)


def _all_replies(calls: Sequence[Call]) -> list[Reply]:
    """All submitted before the first is read; a failure closes, and so cancels, the rest."""
    with mapped_errors(), ExitStack() as stack:
        streams = [stack.enter_context(call.open()) for call in calls]
        return [stream.reply() for stream in streams]


async def _all_replies_async(calls: Sequence[Call]) -> list[Reply]:
    tasks = [asyncio.ensure_future(agenerate(call)) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


make_loadable(LlamaWorkerLLM)
