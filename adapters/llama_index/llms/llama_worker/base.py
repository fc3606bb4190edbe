"""LlamaWorkerLLM: a local GGUF model as a LlamaIndex LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.llms.llama_worker._call import Call, aowned, owned
from llama_index.llms.llama_worker._component import WorkerComponent
from llama_index.llms.llama_worker._messages import Transcript, chat_response, completion_response, to_core
from llama_index.llms.llama_worker._observed import (
    aobserved_chat,
    aobserved_completion,
    observed_chat,
    observed_completion,
)
from llama_index.llms.llama_worker._tokenizer import Tokenizer
from pydantic import ConfigDict

from llama_worker import Message, SamplingParams, UnsupportedFeatureError

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

# What LlamaIndex passes to models that call tools, and the values that ask for nothing.
_FORBIDDEN = {
    "tools": "call the model without tools, or use a ReActAgent, which describes them in the prompt",
    "tool_choice": "call the model without tools",
    "response_format": "ask for the format in the prompt and parse the reply",
    "grammar": "ask for the format in the prompt and parse the reply",
}
_NOTHING: tuple[object, ...] = (None, [], (), {}, "auto", "none")


class LlamaWorkerLLM(SamplingParams, WorkerComponent, FunctionCallingLLM):
    """A chat model on a llama.cpp worker thread of this process.

    ```python
    llm = LlamaWorkerLLM(model="/models/m.gguf", n_ctx=8192, temperature=0, max_tokens=64)
    llm.complete("Hello").text
    ```

    Keywords: all fields of ModelConfig (or `worker`), WorkerConfig and SamplingParams, `timeout`, and
    those of every LlamaIndex LLM. `messages_to_prompt` and `completion_to_prompt`, where given, replace
    the model's own chat template. Each call takes the fields of SamplingParams and `timeout`; an unknown
    keyword raises InvalidRequestError.

    Constructing it loads nothing. Async methods are native; none uses an executor. Closing or leaving a
    stream cancels its request, and so does the cancellation of a task. `llama_worker.cancel_scope` also
    reaches the calls that chat engines make in threads of their own. A stream that is cancelled from
    outside ends in order, with "cancelled" as `raw["finish_reason"]`; the other calls raise
    GenerationCancelled. `raw` holds `model`, `finish_reason` and `usage`, on a stream's last chunk.
    """

    # Where SamplingParams, as a base, differs: it is frozen, and calls what cannot work a bad request.
    model_config = ConfigDict(frozen=False)
    error_type = WorkerComponent.error_type
    if TYPE_CHECKING:  # it takes these in more forms than the one it keeps
        stop: Any = ()
        logit_bias: Any = ()

    is_function_calling_model: bool = False

    @classmethod
    def class_name(cls) -> str:
        return "LlamaWorker_llm"

    @property
    def metadata(self) -> LLMMetadata:
        """What is known of the model without waiting: before it is loaded, what its file's header says."""
        info, n_ctx = self._served()
        return LLMMetadata(
            context_window=n_ctx,
            num_output=self.max_tokens or -1,
            is_chat_model=True,
            is_function_calling_model=self.is_function_calling_model,
            model_name=info.name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What telemetry may see: no paths and no texts."""
        payload = super().to_payload()
        return {**payload, "model": payload["model_name"], "temperature": self.temperature}

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, for `Settings.tokenizer` and every `tokenizer_fn=`."""
        return Tokenizer(self)

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._chat_call(messages, kwargs)
        return observed_chat(self, messages, kwargs, lambda: chat_response(call.generate()))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._chat_call(messages, kwargs)

        async def answer() -> ChatResponse:
            return chat_response(await call.agenerate())

        return await aobserved_chat(self, messages, kwargs, answer)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        call, transcript = self._chat_call(messages, kwargs), Transcript()

        def answer() -> ChatResponseGen:
            return (transcript.chat(event) for event in call.events())

        return owned(observed_chat(self, messages, kwargs, answer), call)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        call, transcript = self._chat_call(messages, kwargs), Transcript()

        async def answer() -> ChatResponseAsyncGen:
            return (transcript.chat(event) async for event in call.aevents())

        return aowned(await aobserved_chat(self, messages, kwargs, answer), call)

    def complete(self, prompt: str | None = None, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        prompt = _required(prompt)
        call = self._completion_call(prompt, formatted, kwargs)
        return observed_completion(self, prompt, kwargs, lambda: completion_response(call.generate()))

    async def acomplete(self, prompt: str | None = None, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        prompt = _required(prompt)
        call = self._completion_call(prompt, formatted, kwargs)

        async def answer() -> CompletionResponse:
            return completion_response(await call.agenerate())

        return await aobserved_completion(self, prompt, kwargs, answer)

    def stream_complete(
        self, prompt: str | None = None, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        prompt = _required(prompt)
        call, transcript = self._completion_call(prompt, formatted, kwargs), Transcript()

        def answer() -> CompletionResponseGen:
            return (transcript.completion(event) for event in call.events())

        return owned(observed_completion(self, prompt, kwargs, answer), call)

    async def astream_complete(
        self, prompt: str | None = None, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        prompt = _required(prompt)
        call, transcript = self._completion_call(prompt, formatted, kwargs), Transcript()

        async def answer() -> CompletionResponseAsyncGen:
            return (transcript.completion(event) async for event in call.aevents())

        return aowned(await aobserved_completion(self, prompt, kwargs, answer), call)

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """None: this version of the model calls no tools."""
        if error_on_no_tool_call:
            raise UnsupportedFeatureError("tool calling", _FORBIDDEN["tools"])
        return []

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if tools or tool_required:
            raise UnsupportedFeatureError("tool calling", _FORBIDDEN["tools"])
        messages = list(chat_history or ())
        if user_msg is not None:
            message = ChatMessage(user_msg, role=MessageRole.USER) if isinstance(user_msg, str) else user_msg
            messages.append(message)
        return {"messages": messages, **kwargs}

    def _chat_call(self, messages: Sequence[ChatMessage], keywords: Mapping[str, Any]) -> Call:
        own = self.messages_to_prompt
        if own is None or own is generic_messages_to_prompt:
            return self._call(to_core(messages), keywords)
        return self._call(own(messages), keywords)

    def _completion_call(self, prompt: str, formatted: bool, keywords: Mapping[str, Any]) -> Call:
        own = self.completion_to_prompt
        if formatted:
            return self._call(prompt, keywords)
        if own is None or own is default_completion_to_prompt:
            return self._call([Message(role="user", content=prompt)], keywords)
        return self._call(own(prompt), keywords)

    def _call(self, prompt: str | Sequence[Message], keywords: Mapping[str, Any]) -> Call:
        """One request with the keywords of one call. Raises RequestError for what cannot be meant."""
        changes = {**keywords}
        timeout = changes.pop("timeout", self.timeout)
        for name in _FORBIDDEN.keys() & changes:
            if changes.pop(name) not in _NOTHING:
                raise UnsupportedFeatureError(name, _FORBIDDEN[name])
        fields = {name: getattr(self, name) for name in SamplingParams.model_fields}
        params = SamplingParams(**{**fields, **changes})
        model = self._served()[0].name
        return Call(self._connect, model, prompt, {"timeout": timeout, **params.model_dump()})


def _required(prompt: str | None) -> str:
    # Core's own decorator answers so, and core's other models with it.
    if prompt is None:
        raise ValueError("No prompt provided in positional or keyword arguments")
    return prompt
