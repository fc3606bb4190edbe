"""What ChatLlamaWorker and LlamaWorkerLLM have in common: from fields and keywords to a Call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from langchain_core.language_models.base import LangSmithParams
from pydantic import BaseModel, model_validator

from langchain_llama_worker._calls import Call
from langchain_llama_worker._errors import mapped_errors
from langchain_llama_worker._params import PROVIDER, ModelFields, SamplingFields, log_inert, merged_stops
from langchain_llama_worker._threads import session_of
from langchain_llama_worker._tools import core_format
from llama_worker import (
    InvalidRequestError,
    Message,
    ModelConfig,
    SamplingParams,
    ToolSpec,
    UnsupportedFeatureError,
    __version__,
)

# Keywords that LangChain passes along and that mean nothing more here.
_INERT = frozenset({"api_key", "strict", "parallel_tool_calls", "tool_choice"})
_FORBIDDEN = {
    "tools": "a completion calls none; use ChatLlamaWorker",
    "functions": "give tools",
    "function_call": "give tool_choice",
}
_CALL_TAKES = "a call takes the fields of SamplingParams and what the docstring of this class names"
_OPTIONS = frozenset({"model", "session_id", "timeout", "priority", "stream", "stream_usage"})


class GenerationFields(SamplingFields, ModelFields):
    """The fields and the inner workings of a generating model.

    Every keyword of SamplingFields, `response_format`, `timeout`, `priority`, `stop`, `stream_usage`, `session_id` and
    `model` may be given to each call. A call's `model` is another model, opened with the other settings of this object.

    `session_id` names the conversation that calls belong to: sessions take turns, and each finds its own KV cache
    first. Without one it is the `thread_id` of the config, if there is one.

    `response_format` says what the text must be: a dict of OpenAI's form, a llama_worker.ResponseFormat (a regex,
    choices or a grammar among others), or a class whose objects are wanted.

    `loras`: the LoRA adapters to generate with, {name: scale} or names alone, of those that `lora_paths` loads or
    the worker's `add_lora` did. A call's replace the object's; {} is the model itself. `speculate`: False guesses
    no tokens ahead, True whatever can be guessed, None as `speculation` says.
    """

    streaming: bool | None = None
    stream_usage: bool = True
    session_id: str | None = None
    response_format: Any = None
    loras: dict[str, float] | list[str] | str | None = None
    speculate: bool | None = None

    _asked_names: ClassVar[frozenset[str]] = frozenset({"response_format", "loras", "speculate"})

    @model_validator(mode="after")
    def _check_asked_fields(self) -> Self:
        self._asked({})
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        # Loaded elsewhere, a model with a worker of its own opens one with the same settings.
        return {} if self.worker is None else self.worker.config.model_dump(exclude_defaults=True)

    @model_validator(mode="after")
    def _set_llama_worker_version(self) -> Self:
        add: Callable[[str, str], None] | None = getattr(self, "_add_version", None)
        if add is not None:  # an older core does not keep versions
            add("llama-worker", __version__)
        return self

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # Not "stop": LangChain puts the call's own under that name, and two models that differ in
        # their stops must not share an entry of a cache.
        sampling = self._sampling().model_dump()
        stops = sampling.pop("stop")
        return {**self._settings().model_dump(), **sampling, **self._asked_by_default, "stop_sequences": list(stops)}

    @property
    def _asked_by_default(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in sorted(self._asked_names & set(type(self).model_fields))}
        fields["response_format"] = core_format(self.response_format)
        return {name: _plain(value) for name, value in fields.items() if value is not None}

    def __repr_args__(self) -> Any:
        shown = {name: value for name, value in self._asked_by_default.items() if isinstance(value, str | int)}
        return [*super().__repr_args__(), *shown.items()]

    def _tracing_params(
        self, kind: Literal["chat", "llm"], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> LangSmithParams:
        # Unchecked: a bad value is for the call to report, not for its trace.
        temperature, max_tokens = (kwargs.get(name, getattr(self, name)) for name in ("temperature", "max_tokens"))
        params = LangSmithParams(
            ls_provider=PROVIDER,
            ls_model_name=str(kwargs.get("model") or self._model_name),
            ls_model_type=kind,
            ls_temperature=SamplingParams().temperature if temperature is None else temperature,
        )
        if max_tokens is not None:
            params["ls_max_tokens"] = max_tokens
        if stops := merged_stops(self.stop, stop):
            params["ls_stop"] = stops
        return params

    def _call(
        self, prompt: str | Sequence[Message], stop: list[str] | None, kwargs: Mapping[str, Any], run: Any = None
    ) -> Call:
        """One request with the keywords of one call, for the run of the manager `run`.

        Raises typed errors for what cannot be meant.
        """
        self._check_keywords(kwargs)
        model, timeout, usage = (kwargs.get(name) for name in ("model", "timeout", "stream_usage"))
        changes = {name: value for name, value in kwargs.items() if name in SamplingParams.model_fields}
        sampling = self._sampling(stop, changes).model_dump(exclude_unset=True)
        session = self._said(kwargs, "session_id")
        options = {
            "timeout": self.timeout if timeout is None else timeout,
            "session": session_of(run) if session is None else session,
            "priority": self._said(kwargs, "priority"),
        }
        return Call(
            connect=lambda: self._connect(model),
            model=self._served(model),
            prompt=prompt,
            options={**sampling, **self._asked(kwargs), **options},
            stream_usage=self.stream_usage if usage is None else usage,
            retry=self._retry,
        )

    def _asked(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked of the answer beside its sampling, as the worker's keywords. What nobody gave is not there."""
        wanted = core_format(self._said(kwargs, "response_format"), strict=kwargs.get("strict"))
        asked = {"response_format": wanted, **{name: self._said(kwargs, name) for name in ("loras", "speculate")}}
        return {name: value for name, value in asked.items() if value is not None}

    def _said(self, kwargs: Mapping[str, Any], name: str) -> Any:
        """What the call says, or the constructor if the call says None."""
        value = kwargs.get(name)
        return getattr(self, name) if value is None else value

    def _check_keywords(self, kwargs: Mapping[str, Any]) -> None:
        known = {*_OPTIONS, *SamplingParams.model_fields, *self._asked_names}
        for name, value in kwargs.items():
            if name in known:
                continue
            if name not in _INERT and name not in _FORBIDDEN:
                raise InvalidRequestError.unknown(
                    name, value, sorted(known), described=_CALL_TAKES, of_model=ModelConfig.model_fields
                )
            if name in _FORBIDDEN and value:
                raise UnsupportedFeatureError(name, _FORBIDDEN[name])
            if value is not None:
                log_inert(name)

    def _tokens(self, text: str) -> list[int]:
        with mapped_errors():
            return self._connect().tokenize(text)

    def _count(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> int:
        with mapped_errors():
            return self._connect().count_tokens(messages, tools=tools)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value
