"""Prompts: the forms in which a caller may ask, and the one request that each becomes.

A str is a raw completion; a sequence of messages, or of mappings with role and content, is a chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from llama_worker._config import ModelConfig
from llama_worker._errors import InvalidRequestError
from llama_worker._requests import EmbedRequest, GenerationRequest, Message, SamplingParams, ToolSpec

MessageLike: TypeAlias = Message | Mapping[str, Any]
ToolLike: TypeAlias = ToolSpec | Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[MessageLike] | GenerationRequest
_Kind = TypeVar("_Kind", Message, ToolSpec)

_ASKED = frozenset(GenerationRequest.model_fields) - {"prompt", "messages", "params", "timeout", "session", "priority"}
"""Keywords of a call that are the request's and not its sampling."""

_KNOWN = (*SamplingParams.model_fields, *sorted(_ASKED), "timeout", "session", "priority")
_DESCRIBED = "a call takes the fields of SamplingParams and of GenerationRequest"


def core_messages(prompt: Sequence[MessageLike]) -> tuple[Message, ...]:
    if isinstance(prompt, Mapping | Message) or not isinstance(prompt, Sequence):
        raise InvalidRequestError("prompt", type(prompt).__name__, "give a str, or a list of messages")
    return _each(Message, "messages", prompt, "each must be a Message or a mapping with role and content")


def core_tools(tools: Sequence[ToolLike]) -> tuple[ToolSpec, ...]:
    if isinstance(tools, Mapping | ToolSpec) or not isinstance(tools, Sequence):
        raise InvalidRequestError("tools", type(tools).__name__, "give a list of tools")
    return _each(ToolSpec, "tools", tools, "each must be a ToolSpec or a mapping with a name")


def _each(kind: type[_Kind], field: str, items: Sequence[Any], reason: str) -> tuple[_Kind, ...]:
    return tuple(_one(kind, field, item, f"{field}.{index}", reason) for index, item in enumerate(items))


def _one(kind: type[_Kind], field: str, item: Any, place: str, reason: str) -> _Kind:
    if isinstance(item, kind):
        return item
    if not _has_fields(item):
        raise InvalidRequestError(field, type(item).__name__, reason)
    try:
        return kind(**item)
    except InvalidRequestError as error:
        raise error.within(place) from None


def _has_fields(item: object) -> bool:
    return isinstance(item, Mapping) and all(isinstance(name, str) for name in item)


def check_known(keywords: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for the first of a call's keywords that no call takes."""
    for name, value in keywords.items():
        if name not in _KNOWN:
            fields = ModelConfig.model_fields
            raise InvalidRequestError.unknown(name, value, _KNOWN, described=_DESCRIBED, of_model=fields)


def generation_request(
    prompt: Prompt,
    timeout: float | None,
    sampling: Mapping[str, Any],
    session: str | None = None,
    priority: int = 0,
) -> GenerationRequest:
    if isinstance(prompt, GenerationRequest):
        if sampling or (timeout, session, priority) != (None, None, 0):
            raise InvalidRequestError(
                "prompt", "GenerationRequest", "it brings its own params, timeout, session and priority; give no others"
            )
        return prompt
    check_known(sampling)
    asked = {name: value for name, value in sampling.items() if name in _ASKED}
    params = SamplingParams(**{name: value for name, value in sampling.items() if name not in _ASKED})
    text, messages = (prompt, None) if isinstance(prompt, str) else (None, core_messages(prompt))
    return GenerationRequest(
        prompt=text, messages=messages, params=params, timeout=timeout, session=session, priority=priority, **asked
    )


def embed_request(
    texts: Sequence[str],
    normalize: bool,
    overlong: Literal["error", "truncate"],
    timeout: float | None,
    session: str | None = None,
    priority: int = 0,
) -> EmbedRequest:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InvalidRequestError("texts", type(texts).__name__, "give a list of texts")
    return EmbedRequest(
        texts=tuple(texts), normalize=normalize, overlong=overlong, timeout=timeout, session=session, priority=priority
    )
