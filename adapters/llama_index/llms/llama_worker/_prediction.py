"""PredictingLLM: structured prediction by constraint, in place of the tool calls that LlamaIndex would make."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from copy import copy
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program.utils import FlexibleModel, get_program_for_llm
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.types import BasePydanticProgram, Model, PydanticProgramMode
from llama_index.llms.llama_worker._structured import Growing, keywords_for, whole, with_schema
from llama_index_instrumentation import get_dispatcher

_dispatcher = get_dispatcher(__name__)
Keywords: TypeAlias = Mapping[str, Any] | None
Asked: TypeAlias = tuple[list[ChatMessage], dict[str, Any]]


class PredictingLLM(FunctionCallingLLM):
    """An LLM whose structured predictions are chats that are held to the schema of the class.

    The schema is in the prompt too, and the system prompt in all four methods. One LLM event for each prediction.
    They raise UnusableReply if the reply was cut off, or if the class wants more than its schema says. A stream
    yields what there is of the object, then the object; one that is cancelled just ends. Another
    `pydantic_program_mode` than DEFAULT is LlamaIndex's own way.
    """

    def structured_predict(
        self, output_cls: type[Model], prompt: PromptTemplate, llm_kwargs: Keywords = None, **prompt_args: Any
    ) -> Model:
        if not self._predicts:
            by_core: Model = super().structured_predict(output_cls, copy(prompt), _copied(llm_kwargs), **prompt_args)
            return by_core
        _started(output_cls, prompt, prompt_args)
        messages, keywords = self._asked(output_cls, prompt, llm_kwargs, prompt_args)
        result = whole(self.chat(messages, **keywords), output_cls)
        _dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    async def astructured_predict(
        self, output_cls: type[Model], prompt: PromptTemplate, llm_kwargs: Keywords = None, **prompt_args: Any
    ) -> Model:
        if not self._predicts:
            by_core: Model = await super().astructured_predict(
                output_cls, self._formatted(prompt, prompt_args), _copied(llm_kwargs), **prompt_args
            )
            return by_core
        _started(output_cls, prompt, prompt_args)
        messages, keywords = self._asked(output_cls, prompt, llm_kwargs, prompt_args)
        result = whole(await self.achat(messages, **keywords), output_cls)
        _dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    def stream_structured_predict(
        self, output_cls: type[Model], prompt: PromptTemplate, llm_kwargs: Keywords = None, **prompt_args: Any
    ) -> Generator[Model | FlexibleModel, None, None]:
        # Asked for here and not by the first step: it belongs to the cancel scopes around this call.
        _started(output_cls, prompt, prompt_args)
        objects = self._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)

        def stream() -> Generator[Model | FlexibleModel, None, None]:
            last = None
            try:
                for last in objects:
                    yield _in_progress(last)
            finally:
                objects.close()  # core's own method leaves this to the garbage collector
            _dispatcher.event(LLMStructuredPredictEndEvent(output=last))

        return stream()

    async def astream_structured_predict(
        self, output_cls: type[Model], prompt: PromptTemplate, llm_kwargs: Keywords = None, **prompt_args: Any
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        _started(output_cls, prompt, prompt_args)
        objects = await self._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)

        async def stream() -> AsyncGenerator[Model | FlexibleModel, None]:
            last = None
            try:
                async for last in objects:
                    yield _in_progress(last)
            finally:
                await objects.aclose()
            _dispatcher.event(LLMStructuredPredictEndEvent(output=last))

        return stream()

    def _structured_stream_call(
        self, output_cls: type[Model], prompt: PromptTemplate, llm_kwargs: Keywords = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        if not self._predicts:
            return self._program(output_cls, prompt).stream_call(llm_kwargs=_copied(llm_kwargs), **prompt_args)
        messages, keywords = self._asked(output_cls, prompt, llm_kwargs, prompt_args)
        return Growing(output_cls).read(self.stream_chat(messages, **keywords))

    async def _structured_astream_call(
        self, output_cls: type[Model], prompt: PromptTemplate, llm_kwargs: Keywords = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        if not self._predicts:
            program = self._program(output_cls, prompt)
            return await program.astream_call(llm_kwargs=_copied(llm_kwargs), **prompt_args)
        messages, keywords = self._asked(output_cls, prompt, llm_kwargs, prompt_args)
        return Growing(output_cls).aread(await self.astream_chat(messages, **keywords))

    @property
    def _predicts(self) -> bool:
        return self.pydantic_program_mode == PydanticProgramMode.DEFAULT

    def _asked(
        self, output_cls: type[Model], prompt: PromptTemplate, llm_kwargs: Keywords, prompt_args: dict[str, Any]
    ) -> Asked:
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        return with_schema(messages, output_cls), keywords_for(output_cls, llm_kwargs)

    def _program(self, output_cls: type[Model], prompt: Any) -> BasePydanticProgram[Model]:
        """Core's program for streams. Its function calling one would leave it to the model whether it calls."""
        mode = self.pydantic_program_mode
        forced = {"tool_choice": "required"} if mode == PydanticProgramMode.FUNCTION else {}
        return get_program_for_llm(output_cls, copy(prompt), self, pydantic_program_mode=mode, **forced)

    def _formatted(self, prompt: PromptTemplate, prompt_args: dict[str, Any]) -> Any:
        """The prompt with the system prompt, which core's function calling program forgets in its async call."""
        if self.pydantic_program_mode != PydanticProgramMode.FUNCTION or not self.system_prompt:
            return copy(prompt)
        return ChatPromptTemplate(self._extend_messages(prompt.format_messages(llm=self, **prompt_args)))


def _copied(llm_kwargs: Keywords) -> dict[str, Any]:
    # Core's programs remove what they do not want from the caller's own dictionary, and write into the prompt.
    return dict(llm_kwargs or {})


def _started(output_cls: type[Any], prompt: PromptTemplate, prompt_args: dict[str, Any]) -> None:
    _dispatcher.event(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args))


def _in_progress(output: Any) -> Any:
    _dispatcher.event(LLMStructuredPredictInProgressEvent(output=output))
    return output
