"""What a caller asks for: messages or a raw prompt, tools, the form of the answer, sampling, texts to embed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llama_worker._config import NAME, LoraName, Settings, distinct, named_pairs
from llama_worker._errors import FieldError, InvalidRequestError

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
_MOST_BIAS = 1e4
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Timeout = Annotated[float | None, Field(gt=0, le=1e9, allow_inf_nan=False)]
_Session = Annotated[str | None, Field(min_length=1, max_length=256), NAME]
_Priority = Annotated[int, Field(ge=-3, le=3)]
_Scale = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class ToolCall(Settings):
    """One call of a tool, complete and valid. `arguments` is the JSON object; `id` is unique in its reply.

    OpenAI's form, `{"id", "type": "function", "function": {"name", "arguments"}}`, is taken too.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    id: Annotated[str, NAME]
    name: Annotated[str, Field(min_length=1), NAME]
    arguments: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _from_openai(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
            return {"id": value.get("id") or "", **_without(value["function"])}
        return value

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return _json(value) if isinstance(value, str) else value


class Message(Settings):
    """One turn of a conversation. `name` is passed to the template, which may ignore it.

    An assistant's turn may have `reasoning`, which the template replays or drops, and `tool_calls`; the
    result of a call is a turn of the role "tool" with its `tool_call_id`.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    role: Role
    content: str
    name: Annotated[str | None, NAME] = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: Annotated[str | None, NAME] = None

    @model_validator(mode="before")
    @classmethod
    def _no_content(cls, value: Any) -> Any:
        """A turn that only calls tools may say nothing."""
        if isinstance(value, Mapping) and value.get("tool_calls") and value.get("content") is None:
            return {**value, "content": ""}
        return value

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        return () if value is None else tuple(value) if isinstance(value, list) else value


class ToolSpec(Settings):
    """A tool that the model may call. `parameters` is the JSON schema of its arguments; {} means none.

    `strict`: True refuses a schema that cannot be enforced whole; None enforces what can be and validates the
    rest. OpenAI's form, `{"type": "function", "function": {...}}`, is taken too.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    name: Annotated[str, Field(min_length=1, max_length=256), NAME]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_openai(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
            return _without(value["function"])
        return value

    @field_validator("description", "parameters", mode="before")
    @classmethod
    def _absent(cls, value: Any, info: ValidationInfo) -> Any:
        return ("" if info.field_name == "description" else {}) if value is None else value


class ToolName(Settings):
    """The tool that must be called. OpenAI's `{"type": "function", "function": {"name": ...}}` is taken too."""

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    name: Annotated[str, Field(min_length=1), NAME]

    @model_validator(mode="before")
    @classmethod
    def _from_openai(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
            return dict(value["function"])
        return value


ToolChoice: TypeAlias = Literal["auto", "none", "required"] | ToolName
"""auto: text or calls, as the model likes; none: text; required: a call of any tool; ToolName: of this one."""


_CHOICES = ("auto", "none", "required")


class ResponseFormat(Settings):
    """What the text of a reply must be, whole: enforced while it is sampled.

    `type` says which of the other fields counts: "json_object" none, "json_schema" `json_schema`, "regex"
    `regex`, "choice" `choices`, "lark" and "gbnf" `grammar`. `strict` is that of ToolSpec. OpenAI's form,
    `{"type": "json_schema", "json_schema": {"name", "schema", "strict"}}`, is taken too.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    type: Literal["json_object", "json_schema", "regex", "choice", "lark", "gbnf"]
    json_schema: dict[str, Any] | bool | None = None
    regex: str | None = None
    choices: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None
    grammar: str | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_openai(cls, value: Any) -> Any:
        inner = value.get("json_schema") if isinstance(value, Mapping) else None
        if isinstance(inner, Mapping) and "schema" in inner and not set(inner) - _OPENAI_SCHEMA:
            strict = value.get("strict", inner.get("strict"))
            return {**value, "json_schema": inner["schema"], "strict": strict}
        return value

    @field_validator("choices", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> ResponseFormat:
        needed = _NEEDED[self.type]
        given = {name for name in set(_NEEDED.values()) - {None} if getattr(self, str(name)) is not None}
        if given != {needed} - {None}:
            raise InvalidRequestError("response_format", self.type, f"give {needed or 'no other field'} with this type")
        return self


_OPENAI_SCHEMA = {"name", "description", "schema", "strict"}
_NEEDED: dict[str, str | None] = {
    "json_object": None,
    "json_schema": "json_schema",
    "regex": "regex",
    "choice": "choices",
    "lark": "grammar",
    "gbnf": "grammar",
}


def _without(function: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's inner object without what it does not say."""
    return {key: value for key, value in function.items() if value is not None}


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError as exc:
        raise ValueError("must be a JSON object, or the text of one") from exc


class SamplingParams(Settings):
    """How tokens are chosen and when to stop. Names and defaults are llama.cpp's; docs/options.md has every field.

    `max_tokens`: None means as many as fit into n_ctx. `temperature` 0 is greedy. `seed` None draws one.
    `stop`: strings that end the generation and are not part of the text. `logprobs`: None for none,
    otherwise how many alternatives to report beside each sampled token.
    `logit_bias`: token id -> added to its logit; -inf bans it. A temperature below 0.001 counts as 0.
    `repeat_last_n` and `dry_penalty_last_n` -1 mean all of n_ctx.
    `mirostat` 1 or 2 replaces the truncating samplers.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    max_tokens: Annotated[int | None, Field(ge=1, le=2**24)] = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...], Field(max_length=64)] = ()
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.8
    top_k: Annotated[int, Field(ge=0, le=2**24)] = 40
    top_p: _Share = 0.95
    min_p: _Share = 0.05
    typical_p: _Share = 1.0
    top_n_sigma: Annotated[float, Field(ge=-1, le=1000, allow_inf_nan=False)] = -1.0
    xtc_probability: _Share = 0.0
    xtc_threshold: _Share = 0.1
    dynatemp_range: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    dynatemp_exponent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    repeat_last_n: Annotated[int, Field(ge=-1, le=2**24)] = 64
    frequency_penalty: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 0.0
    dry_multiplier: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    dry_base: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 1.75
    dry_allowed_length: Annotated[int, Field(ge=0, le=2**16)] = 2
    dry_penalty_last_n: Annotated[int, Field(ge=-1, le=2**24)] = -1
    # llama.cpp tokenizes around every breaker: more or longer ones would hold up the worker for seconds.
    dry_sequence_breakers: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=20)], ...], Field(max_length=8)
    ] = ("\n", ":", '"', "*")
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 5.0
    mirostat_eta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: Annotated[int | None, Field(ge=0, lt=2**32 - 1)] = None
    ignore_eos: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=100)] = None

    @field_validator("stop", "dry_sequence_breakers", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            try:
                return tuple(sorted((int(token), float(bias)) for token, bias in value.items()))
            except (TypeError, ValueError) as exc:
                raise ValueError("token ids must be integers and biases numbers") from exc
        return value

    @field_validator("logit_bias")
    @classmethod
    def _no_nan(cls, value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        if any(not bias <= _MOST_BIAS for _, bias in value):
            raise ValueError(f"a bias must be a number up to {_MOST_BIAS:g}; -inf bans the token")
        return value


class GenerationRequest(Settings):
    """Either `messages` (a chat, rendered by the model's template) or `prompt` (raw text), not both.

    `tools`, `tool_choice`, `parallel_tool_calls` (may one reply hold several calls), `enable_thinking` (None: as
    the template likes), `reasoning_budget` (tokens of thought after which the answer is begun; None: no limit) and
    `template_variables` (further names for the template) need `messages`. `response_format` holds for the text of
    the reply; together with tools the reply is either calls or such a text.

    `loras`: the LoRA adapters to generate with, by the names that they were loaded under, each with its scale: a
    mapping, or names alone for the scale 1. Without it, none: the model itself.
    `speculate`: False guesses nothing of this reply, True whatever can be guessed, None as its ModelConfig says.

    `timeout` is in seconds and includes the time in the queue. `session` names whom it is for: sessions that
    wait take turns, and of equally good slots each gets the one that it used last. Without one it belongs to the
    thread that submits it, which for all tasks of an event loop is the loop's. `priority` (-3 to 3) goes before
    lower ones, which get every seventeenth turn at least.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    params: SamplingParams = SamplingParams()
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = False
    response_format: ResponseFormat | None = None
    enable_thinking: bool | None = None
    reasoning_budget: Annotated[int | None, Field(ge=0, le=2**24)] = None
    template_variables: dict[str, Any] = Field(default_factory=dict)
    loras: Annotated[tuple[tuple[LoraName, _Scale], ...], Field(max_length=64)] = ()
    speculate: bool | None = None
    timeout: _Timeout = None
    session: _Session = None
    priority: _Priority = 0

    @field_validator("tools", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        return () if value is None else tuple(value) if isinstance(value, list) else value

    @field_validator("loras", mode="before")
    @classmethod
    def _scaled(cls, value: Any) -> Any:
        if value is None:
            return ()
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list | tuple | set | frozenset):
            names = [(name, 1.0) if isinstance(name, str) else name for name in names]
        return named_pairs(names, _number)

    @field_validator("loras")
    @classmethod
    def _distinct(cls, value: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        return distinct(value)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _known_choice(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in _CHOICES:
            raise ValueError(f"it is one of {', '.join(_CHOICES)}, or a ToolName")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> GenerationRequest:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidRequestError("tools", twice, "two tools have this name; names must be unique")
        if isinstance(self.tool_choice, ToolName) and self.tool_choice.name not in names:
            raise InvalidRequestError(
                "tool_choice", self.tool_choice.name, f"the tools are {', '.join(names) or 'none'}"
            )
        if self.tool_choice == "required" and not names:
            raise InvalidRequestError("tool_choice", "required", "there is no tool to call; give tools")
        return self


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class EmbedRequest(Settings):
    """Texts to turn into vectors, one each, in order.

    `overlong` says what happens to a text that does not fit into one batch: "error" raises
    ContextOverflowError, "truncate" keeps its head. `normalize` scales each vector to length 1.
    `timeout`, `session` and `priority` are those of GenerationRequest.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    texts: tuple[str, ...]
    normalize: bool = True
    overlong: Literal["error", "truncate"] = "error"
    timeout: _Timeout = None
    session: _Session = None
    priority: _Priority = 0
