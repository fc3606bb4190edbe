"""Keywords of one call: which are sampling parameters, which the request's, and what they mean. All pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.llms.llama_worker._tools import core_choice, core_tools

from llama_worker import GenerationRequest, InvalidRequestError, ModelConfig, ResponseFormat, SamplingParams

_REQUEST = frozenset(GenerationRequest.model_fields) - {"messages", "prompt", "params"}
_OPTIONAL = _REQUEST - {"timeout"} | {"grammar"}
"""Keywords for which None says nothing. LlamaIndex passes `tool_choice=None` for one."""


_KNOWN = (*SamplingParams.model_fields, *sorted({*_REQUEST, "grammar", "session_id"}))
_CALL_TAKES = "a call takes the fields of SamplingParams and of GenerationRequest, grammar and session_id"


def worker_keywords(keywords: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What LlamaWorker.generate takes, from a call's `keywords` and the LLM's `fields` where it gives none.

    Raises InvalidRequestError for a name that nobody knows and a value that cannot be meant.
    """
    _check_known(keywords)
    given = {name: value for name, value in _named(keywords).items() if value is not None or name not in _OPTIONAL}
    merged = {**_named(fields), **given}
    request = {name: value for name, value in merged.items() if name in _OPTIONAL and value is not None}
    sampling = SamplingParams(**{name: value for name, value in merged.items() if name not in _REQUEST | {"grammar"}})
    return {"timeout": merged.get("timeout"), **sampling.model_dump(), **_meant(request)}


def _check_known(keywords: Mapping[str, Any]) -> None:
    for name, value in keywords.items():
        if name not in _KNOWN:
            fields = ModelConfig.model_fields
            raise InvalidRequestError.unknown(name, value, _KNOWN, described=_CALL_TAKES, of_model=fields)


def _named(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """By the worker's own names: a `session_id` is a session."""
    named = dict(keywords)
    session_id = named.pop("session_id", None)
    if session_id is None:
        return named
    if named.get("session") is not None:
        raise InvalidRequestError("session_id", session_id, "session is given too; leave one of them out")
    return {**named, "session": session_id}


def _meant(request: dict[str, Any]) -> dict[str, Any]:
    """The request's keywords in the worker's own forms."""
    if "tools" in request:
        request["tools"] = core_tools(request["tools"])
    if "tool_choice" in request:
        request["tool_choice"] = core_choice(request["tool_choice"])
    return _with_format(request)


def _with_format(request: dict[str, Any]) -> dict[str, Any]:
    """`grammar` is GBNF, as everywhere around llama.cpp; {"type": "text"} is OpenAI's way to ask for nothing."""
    grammar, asked = request.pop("grammar", None), request.pop("response_format", None)
    if isinstance(asked, Mapping) and asked.get("type") == "text":
        asked = None
    if grammar is not None and asked is not None:
        raise InvalidRequestError(
            "grammar", type(grammar).__name__, "response_format is given too; leave one of them out"
        )
    if grammar is not None:
        asked = ResponseFormat(type="gbnf", grammar=grammar)
    return request if asked is None else {**request, "response_format": asked}
