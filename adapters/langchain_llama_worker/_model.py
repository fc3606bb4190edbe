"""What ChatLlamaWorker and LlamaWorkerLLM have in common: from fields and keywords to a Call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from langchain_core.language_models.base import LangSmithParams
from pydantic import model_validator

from langchain_llama_worker._calls import Call
from langchain_llama_worker._errors import mapped_errors
from langchain_llama_worker._params import PROVIDER, ModelFields, SamplingFields, log_inert, merged_stops
from llama_worker import (
    InvalidRequestError,
    Message,
    ModelConfig,
    SamplingParams,
    UnsupportedFeatureError,
    __version__,
)

# Keywords that LangChain passes along and that mean nothing more here.
_INERT = frozenset({"api_key", "parallel_tool_calls", "tool_choice", "strict"})
_FORBIDDEN = {
    "tools": "call the model without tools",
    "functions": "call the model without functions",
    "response_format": "ask for the format in the prompt and parse the reply",
}
_OPTIONS = frozenset({"model", "timeout", "stream", "stream_usage"})


class GenerationFields(SamplingFields, ModelFields):
    """The fields and the inner workings of a generating model.

    Every keyword of SamplingFields, `timeout`, `stop`, `stream_usage` and `model` may be given to each
    call. A call's `model` is another model, opened with the other settings of this object.
    """

    streaming: bool | None = None
    stream_usage: bool = True

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
        return {**self._settings().model_dump(), **sampling, "stop_sequences": list(stops)}

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

    def _call(self, prompt: str | Sequence[Message], stop: list[str] | None, kwargs: Mapping[str, Any]) -> Call:
        """One request with the keywords of one call. Raises typed errors for what cannot be meant."""
        _check_keywords(kwargs)
        model, timeout, usage = (kwargs.get(name) for name in ("model", "timeout", "stream_usage"))
        changes = {name: value for name, value in kwargs.items() if name in SamplingParams.model_fields}
        sampling = self._sampling(stop, changes).model_dump(exclude_unset=True)
        return Call(
            connect=lambda: self._connect(model),
            model=self._served(model),
            prompt=prompt,
            options={**sampling, "timeout": self.timeout if timeout is None else timeout},
            stream_usage=self.stream_usage if usage is None else usage,
            retry=self._retry,
        )

    def _tokens(self, text: str) -> list[int]:
        with mapped_errors():
            return self._connect().tokenize(text)

    def _count(self, text_or_messages: str | Sequence[Message]) -> int:
        with mapped_errors():
            return self._connect().count_tokens(text_or_messages)


def _check_keywords(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in _OPTIONS or name in SamplingParams.model_fields:
            continue
        if name not in _INERT and name not in _FORBIDDEN:
            raise InvalidRequestError(name, value, _unknown(name))
        if name in _FORBIDDEN and value:
            raise UnsupportedFeatureError(name, _FORBIDDEN[name])
        if value is not None:
            log_inert(name)


def _unknown(name: str) -> str:
    if name in ModelConfig.model_fields:
        return "belongs to the model, not to a call; give it to the constructor"
    return "unknown; a call takes the fields of SamplingParams, stop, timeout, model and stream_usage"
