"""ChatLlamaWorker: a local GGUF model as a LangChain chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict

from langchain_llama_worker._calls import Call, aevents, agenerate, events, generate
from langchain_llama_worker._errors import mapped_errors
from langchain_llama_worker._loading import make_loadable
from langchain_llama_worker._messages import ChatChunks, chat_result, to_core
from langchain_llama_worker._model import GenerationFields
from langchain_llama_worker._profile import profile_of
from llama_worker import UnsupportedFeatureError, inspect_model


class ChatLlamaWorker(GenerationFields, BaseChatModel):
    """A chat model on a llama.cpp worker thread of this process.

    ```python
    chat = ChatLlamaWorker(model="/models/m.gguf", n_ctx=8192, temperature=0, max_tokens=64)
    chat.invoke("Hello").text
    ```

    Keywords: all fields of ModelConfig (or `worker`), WorkerConfig and SamplingParams, `timeout`,
    `max_retries`, `stop`, `streaming`, `stream_usage`. An unknown one raises ConfigError.

    Constructing it loads nothing. Objects with equal settings share one worker, and any number of
    threads and event loops may use one object at once: requests are batched. Async methods are native;
    none uses an executor. Leaving a stream, cancelling a task and `llama_worker.cancel_scope` cancel the
    request. Errors are instances of both llama_worker's and langchain_core's classes; a request that
    was cancelled from outside raises GenerationCancelled, streamed or not.
    """

    model_config = ConfigDict(extra="forbid")

    @property
    def _llm_type(self) -> str:
        return "llama-worker-chat"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._chat_call(messages, stop, kwargs)
        return chat_result(generate(call), call.model)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._chat_call(messages, stop, kwargs)
        return chat_result(await agenerate(call), call.model)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._chat_call(messages, stop, kwargs)
        chunks = ChatChunks(call.model, usage=call.stream_usage)
        with closing(events(call)) as answers:
            for event in answers:
                chunk = chunks.chunk(event)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self._chat_call(messages, stop, kwargs)
        chunks = ChatChunks(call.model, usage=call.stream_usage)
        async with aclosing(aevents(call)) as answers:
            async for event in answers:
                chunk = chunks.chunk(event)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of `text` in the model's vocabulary. Never waits for a generation."""
        return self._tokens(text) if self.custom_get_token_ids is None else super().get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """How many tokens `text` has in the model's vocabulary."""
        return len(self.get_token_ids(text))

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """How many tokens the prompt has that the model's template makes of `messages`."""
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages, tools)
        with mapped_errors():
            if tools:
                raise UnsupportedFeatureError("counting the tokens of tools", "count the messages alone")
            return self._count(to_core(messages))

    def _chat_call(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Call:
        with mapped_errors():
            return self._call(to_core(messages), stop, kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing_params("chat", stop, kwargs)

    def _resolve_model_profile(self) -> ModelProfile | None:
        """What the GGUF's header and our settings say; reads no weights."""
        settings = self._settings()
        loaded = self.worker is not None and self.worker.status().state == "ready"
        info = self.worker.info if self.worker is not None and loaded else inspect_model(settings.model)
        return profile_of(info, n_ctx=settings.n_ctx, max_tokens=self.max_tokens)


make_loadable(ChatLlamaWorker)
