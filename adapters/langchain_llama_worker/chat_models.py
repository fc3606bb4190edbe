"""ChatLlamaWorker: a local GGUF model as a LangChain chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import ConfigDict

from langchain_llama_worker._asked import ChatFields
from langchain_llama_worker._calls import Call, aevents, agenerate, events, generate
from langchain_llama_worker._errors import mapped_errors
from langchain_llama_worker._loading import make_loadable
from langchain_llama_worker._messages import to_core
from langchain_llama_worker._profile import profile_of
from langchain_llama_worker._replies import ChatChunks, chat_result
from langchain_llama_worker._structured import Method, structured
from langchain_llama_worker._threads import Threaded
from langchain_llama_worker._tools import core_choice, core_tools, openai_tool
from llama_worker import inspect_model


class ChatLlamaWorker(ChatFields, Threaded, BaseChatModel):
    """A chat model on a llama.cpp worker thread of this process.

    ```python
    chat = ChatLlamaWorker(model="/models/m.gguf", n_ctx=8192, temperature=0, max_tokens=64)
    chat.invoke("Hello").text
    ```

    Keywords: all fields of ModelConfig (or `worker`), WorkerConfig and SamplingParams, `timeout`,
    `max_retries`, `stop`, `streaming`, `stream_usage`, `session_id`, `response_format`, and those of ChatFields:
    `tool_choice`, `parallel_tool_calls`, `enable_thinking`, `reasoning_budget`, `template_variables`. An unknown one
    raises ConfigError.

    Calls of tools and the form of an answer are enforced while they are sampled. What is cut off is never a call:
    it stands in `invalid_tool_calls`, streamed or not, and why, in `response_metadata["invalid_tool_calls"]`. The
    joined `args` of a streamed call that is none end with a mark, a bracket that closes nothing, which keeps LangChain
    from completing it. Thoughts are `reasoning` blocks, not text.

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
        call = self._chat_call(messages, stop, kwargs, run_manager)
        return chat_result(generate(call), call.model, in_blocks=self._in_blocks)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._chat_call(messages, stop, kwargs, run_manager)
        return chat_result(await agenerate(call), call.model, in_blocks=self._in_blocks)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._chat_call(messages, stop, kwargs, run_manager)
        chunks = ChatChunks(call.model, usage=call.stream_usage, in_blocks=self._in_blocks)
        with closing(events(call)) as answers:
            for event in answers:
                chunk = chunks.chunk(event)
                if chunk is None:
                    continue
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
        call = self._chat_call(messages, stop, kwargs, run_manager)
        chunks = ChatChunks(call.model, usage=call.stream_usage, in_blocks=self._in_blocks)
        async with aclosing(aevents(call)) as answers:
            async for event in answers:
                chunk = chunks.chunk(event)
                if chunk is None:
                    continue
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def bind_tools(
        self,
        tools: Sequence[Any],
        *,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with `tools` to call: pydantic classes, functions, BaseTools, TypedDicts or dicts.

        `tool_choice`: None or "auto", "none", "any" (the same as "required" and True), the name of a tool, or a
        dict of OpenAI's form. `parallel_tool_calls`: may one reply hold several calls; by default it may not.
        `strict`: refuse a schema that cannot be enforced whole. With `response_format` a reply is either calls or
        such a text. Raises InvalidRequestError for what is no tool and no choice.
        """
        with mapped_errors():
            core_choice(tool_choice)
            given = {
                "tool_choice": tool_choice,
                "parallel_tool_calls": parallel_tool_calls,
                "response_format": response_format,
            }
            formatted = [openai_tool(tool, strict=strict) for tool in tools]
        return self.bind(tools=formatted, **{k: v for k, v in given.items() if v is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model with objects for answers: of a pydantic class, or dicts for a TypedDict or JSON schema.

        json_schema and json_mode hold the text of the reply to the schema; json_mode takes no schema too, for any
        JSON object. function_calling makes the reply one call. `strict`: refuse a schema that cannot be enforced
        whole. Streamed, dicts grow; an object of a class comes when it is whole. A reply that is cut off or invalid
        raises OutputParserException; with `include_raw`, which gives a dict of `raw`, `parsed` and `parsing_error`
        (streamed, the last two at the end), it stands there. Raises InvalidRequestError for a class without fields.
        `kwargs` go with every call.
        """
        with mapped_errors():
            self._check_keywords(kwargs)
            return structured(self, schema, method, include_raw=include_raw, strict=strict, kwargs=kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of `text` in the model's vocabulary. Never waits for a generation."""
        return self._tokens(text) if self.custom_get_token_ids is None else super().get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """How many tokens `text` has in the model's vocabulary."""
        return len(self.get_token_ids(text))

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """How many tokens the prompt has that the model's template makes of `messages` and `tools`."""
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages, tools)
        with mapped_errors():
            return self._count(to_core(messages), core_tools(tools))

    @property
    def _in_blocks(self) -> bool:
        return getattr(self, "output_version", None) == "v1"

    def _chat_call(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any], run: Any = None
    ) -> Call:
        with mapped_errors():
            return self._call(to_core(messages), stop, kwargs, run)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing_params("chat", stop, kwargs)

    def _resolve_model_profile(self) -> ModelProfile | None:
        """What the GGUF's header and our settings say; reads no weights."""
        settings = self._settings()
        loaded = self.worker is not None and self.worker.status().state == "ready"
        info = self.worker.info if self.worker is not None and loaded else inspect_model(settings.model)
        return profile_of(info, n_ctx=settings.n_ctx, max_tokens=self.max_tokens, chat_template=settings.chat_template)


make_loadable(ChatLlamaWorker)
