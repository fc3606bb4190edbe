"""LlamaWorkerLLM: a local GGUF model as a LlamaIndex LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

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
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.llms.llama_worker._call import Call, aowned, owned
from llama_index.llms.llama_worker._component import WorkerComponent
from llama_index.llms.llama_worker._errors import UnusableReply
from llama_index.llms.llama_worker._keywords import worker_keywords
from llama_index.llms.llama_worker._messages import to_core
from llama_index.llms.llama_worker._observed import (
    aobserved_chat,
    aobserved_completion,
    observed_chat,
    observed_completion,
)
from llama_index.llms.llama_worker._prediction import PredictingLLM
from llama_index.llms.llama_worker._react import REACT_STOP, teaches_react
from llama_index.llms.llama_worker._replies import Transcript, chat_response, completion_response
from llama_index.llms.llama_worker._tokenizer import Tokenizer
from llama_index.llms.llama_worker._tools import calls_of, core_tools, only_first_call, tools_to_run, wanted_choice
from pydantic import ConfigDict, Field

from llama_worker import InvalidRequestError, Message, SamplingParams, UnsupportedFeatureError

if TYPE_CHECKING:
    from llama_index.core.chat_engine.types import AgentChatResponse
    from llama_index.core.tools.types import BaseTool

Tool: TypeAlias = "BaseTool | Callable[..., Any]"
"""A tool that is called here. Of a function LlamaIndex's agents make a FunctionTool, and so do these methods."""


class LlamaWorkerLLM(SamplingParams, WorkerComponent, PredictingLLM):
    """A chat model on a llama.cpp worker thread of this process.

    ```python
    llm = LlamaWorkerLLM(model="/models/m.gguf", n_ctx=8192, temperature=0, max_tokens=64)
    llm.complete("Hello").text
    ```

    Keywords: all fields of ModelConfig (or `worker`), WorkerConfig and SamplingParams, `timeout`, and
    those of every LlamaIndex LLM. `session_id` names the conversation that calls belong to: sessions take turns, and
    each finds its own KV cache first. `messages_to_prompt` and `completion_to_prompt`, where given, replace
    the model's own chat template. `enable_thinking`, `reasoning_budget` and `loras` are those of GenerationRequest.
    `react_stop`: end a chat without tools where the model would write "Observation:", which is the agent's
    to say; None does so where the first message teaches the format, as a ReActAgent's does.

    Each call takes the fields of SamplingParams and of GenerationRequest (`tools`, in LlamaIndex's or OpenAI's
    form or as functions, `tool_choice`, `parallel_tool_calls`, `response_format`, `timeout`, …) and `grammar`, which
    is GBNF; an unknown keyword raises InvalidRequestError. Tools, choices and formats are enforced while it is sampled.

    Blocks of a reply come as thought, text, calls. A ToolCallBlock is a complete and valid call; one that was
    cut off is only named in `raw["invalid_tool_calls"]`. In a stream the call that is being written stands in
    `message.additional_kwargs["tool_calls"]`, and what is new of a thought in `additional_kwargs["thinking_delta"]`.

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

    is_function_calling_model: bool = True
    enable_thinking: bool | None = None
    reasoning_budget: int | None = Field(default=None, ge=0, le=2**24)
    session_id: str | None = Field(default=None, min_length=1, max_length=256)
    loras: dict[str, float] | list[str] | str | None = None
    react_stop: bool | None = None

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
        """The calls of a response, of a stream's chunk too, where the last may have but the beginning of its arguments.

        Raises UnusableReply if there is none and `error_on_no_tool_call`.
        """
        calls = [call.selection for call in calls_of(response.message)]
        if error_on_no_tool_call and not calls:
            raise UnusableReply(f"the reply calls no tool: {_why_none(response)}")
        return calls

    def predict_and_call(self, tools: Sequence[Tool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        return super().predict_and_call(tools_to_run(tools), *args, **kwargs)

    async def apredict_and_call(self, tools: Sequence[Tool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        return await super().apredict_and_call(tools_to_run(tools), *args, **kwargs)

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[Tool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `chat` that let the model call, or make it call, these tools."""
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(ChatMessage(user_msg, role=MessageRole.USER) if isinstance(user_msg, str) else user_msg)
        choice = wanted_choice(tool_choice, required=tool_required)
        if not tools and choice in ("auto", "none"):
            return {"messages": messages, **kwargs}
        asked = {
            "tools": core_tools(tools),
            "tool_choice": choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
        }
        return {"messages": messages, **asked, **kwargs}

    def _validate_chat_with_tools_response(
        self, response: ChatResponse, tools: Sequence[BaseTool], allow_parallel_tool_calls: bool = False, **kwargs: Any
    ) -> ChatResponse:
        """One call where one was allowed. Ours hold to that already, those of a subclass may not."""
        if allow_parallel_tool_calls:
            return response
        return response.model_copy(update={"message": only_first_call(response.message)})

    def _chat_call(self, messages: Sequence[ChatMessage], keywords: Mapping[str, Any]) -> Call:
        own, stops = self.messages_to_prompt, self._stops(messages, keywords)
        if own is None or own is generic_messages_to_prompt:
            return self._call(to_core(messages), keywords, stops)
        return self._call(own(messages), keywords, stops)

    def _stops(self, messages: Sequence[ChatMessage], keywords: Mapping[str, Any]) -> tuple[str, ...]:
        """What ends this chat beside its own stops."""
        wanted = teaches_react(messages) if self.react_stop is None else self.react_stop
        return (REACT_STOP,) if wanted and not keywords.get("tools") else ()

    def _completion_call(self, prompt: str, formatted: bool, keywords: Mapping[str, Any]) -> Call:
        if keywords.get("tools"):
            raise UnsupportedFeatureError("tools in a completion", "its response cannot carry calls; use chat")
        own = self.completion_to_prompt
        if formatted:
            return self._call(prompt, keywords)
        if own is None or own is default_completion_to_prompt:
            return self._call([Message(role="user", content=prompt)], keywords)
        return self._call(own(prompt), keywords)

    def _call(self, prompt: str | Sequence[Message], keywords: Mapping[str, Any], stops: tuple[str, ...] = ()) -> Call:
        """One request with the keywords of one call. Raises RequestError for what cannot be meant."""
        names = (*SamplingParams.model_fields, *_ANY, *(_THINKING if not isinstance(prompt, str) else ()))
        asked = worker_keywords(keywords, {name: getattr(self, name) for name in names})
        if isinstance(prompt, str) and asked.get("tools"):
            raise InvalidRequestError("tools", "a raw prompt", "only the chat template can render them; leave one out")
        asked["stop"] = (*asked["stop"], *(stop for stop in stops if stop not in asked["stop"]))
        return Call(self._connect, self._served()[0].name, prompt, asked)


_ANY = ("timeout", "session_id", "loras")
_THINKING = ("enable_thinking", "reasoning_budget")


def _why_none(response: ChatResponse) -> str:
    raw = response.raw if isinstance(response.raw, Mapping) else {}
    if raw.get("finish_reason") == "length":
        return "it was cut off; allow more max_tokens"
    return "the model answered by text; force a call with tool_required=True or tool_choice"


def _required(prompt: str | None) -> str:
    # Core's own decorator answers so, and core's other models with it.
    if prompt is None:
        raise ValueError("No prompt provided in positional or keyword arguments")
    return prompt
