"""What a caller asks for: messages or a raw prompt, sampling parameters, texts to embed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, field_validator

from llama_worker._config import Settings
from llama_worker._errors import FieldError, InvalidRequestError

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
_MOST_BIAS = 1e4
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Timeout = Annotated[float | None, Field(gt=0, le=1e9, allow_inf_nan=False)]
_Session = Annotated[str | None, Field(min_length=1, max_length=256)]
_Priority = Annotated[int, Field(ge=-3, le=3)]


class Message(Settings):
    """One turn of a conversation. `name` is passed to the template, which may ignore it."""

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    role: Role
    content: str
    name: str | None = None


class SamplingParams(Settings):
    """How tokens are chosen and when to stop. Names and defaults are llama.cpp's.

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
            except TypeError as exc:
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

    `timeout` is in seconds and includes the time in the queue. `session` names whom it is for: sessions that
    wait take turns. Without one it belongs to the thread that submits it, which for all tasks of an event loop
    is the loop's. `priority` (-3 to 3) goes before lower ones, which get every seventeenth turn at least.
    """

    error_type: ClassVar[type[FieldError]] = InvalidRequestError

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    params: SamplingParams = SamplingParams()
    timeout: _Timeout = None
    session: _Session = None
    priority: _Priority = 0


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
