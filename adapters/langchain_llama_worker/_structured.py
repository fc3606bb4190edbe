"""Objects as answers: what with_structured_output binds to a model, and how it reads what comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import pydantic
import pydantic.v1
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable
from langchain_core.utils.json import parse_partial_json

from langchain_llama_worker._tools import is_model, json_schema, schema_name, schema_tool
from langchain_llama_worker._with_raw import WithRaw
from llama_worker import InvalidRequestError

Method: TypeAlias = Literal["json_schema", "function_calling", "json_mode"]
_METHODS = ("json_schema", "function_calling", "json_mode")
_CUT = "it was cut off; allow more max_tokens"
_NOTHING = object()
_NOTED = "ls_structured_output_format"


def structured(
    model: BaseChatModel, schema: Any, method: str, *, include_raw: bool, strict: bool | None, kwargs: Mapping[str, Any]
) -> Runnable[LanguageModelInput, Any]:
    """`model`, held to `schema`, and a parser. Raises InvalidRequestError."""
    if method not in _METHODS:
        raise InvalidRequestError("method", method, f"it is one of {', '.join(_METHODS)}")
    if schema is None and method != "json_mode":
        raise InvalidRequestError("schema", None, "give one, or method='json_mode' for any JSON object")
    # LangSmith, and LangChain's own tests, read the format from here; it never reaches the worker.
    noted = {} if schema is None else {_NOTED: {"kwargs": {"method": method}, "schema": schema}}
    parser = StructuredOutput(output_class=schema if is_model(schema) else None)
    if method == "function_calling":
        tool = schema_tool(schema, strict=strict)
        parser.tool = tool["function"]["name"]
        bound = _calling(model, tool, {**noted, **kwargs})
    else:
        bound = model.bind(response_format=_format(schema, strict), **{**noted, **kwargs})
    if include_raw:
        return WithRaw(model=bound, parser=parser, in_blocks=getattr(model, "output_version", None) == "v1")
    return bound | parser


def _calling(model: BaseChatModel, tool: dict[str, Any], kwargs: Mapping[str, Any]) -> Runnable[Any, AIMessage]:
    choice = {"type": "function", "function": {"name": tool["function"]["name"]}}
    asked: dict[str, Any] = {"tool_choice": choice, "parallel_tool_calls": False, **kwargs}
    return model.bind_tools([tool], **asked)


def _format(schema: Any, strict: bool | None) -> dict[str, Any]:
    if schema is None:
        return {"type": "json_object"}
    described: dict[str, Any] = {"name": schema_name(schema), "schema": json_schema(schema)}
    return {"type": "json_schema", "json_schema": {**described, **({} if strict is None else {"strict": strict})}}


class StructuredOutput(BaseTransformOutputParser[Any]):
    """Reads the object that a reply is: its text, or the arguments of its call of `tool`.

    It is one of `output_class`, or a dict. LangChain's own parsers complete what is cut off and let it pass; this
    one raises OutputParserException, whose text never says what the reply was. A stream gives a dict as it grows,
    and an object of a class when it is whole.
    """

    output_class: Any = None
    tool: str | None = None

    @property
    def _type(self) -> str:
        return "llama-worker-structured-output"

    def parse(self, text: str) -> Any:
        return self._object(text)

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        generation = result[0]
        message = generation.message if isinstance(generation, ChatGeneration) else AIMessage(generation.text)
        return self._begun(message) if partial else self._whole(message)

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        said, last = None, None
        for piece in input:
            said = _joined(said, piece)
            grown = self._begun(said)
            if grown is not None and grown != last:
                last = grown
                yield grown
        if said is not None and (whole := self._whole(said)) != last:
            yield whole

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        said, last = None, None
        async for piece in input:
            said = _joined(said, piece)
            grown = self._begun(said)
            if grown is not None and grown != last:
                last = grown
                yield grown
        if said is not None and (whole := self._whole(said)) != last:
            yield whole

    def _begun(self, message: BaseMessage) -> Any:
        """A dict as far as it is written. What is still a guess of LangChain's is not shown as an object."""
        if self.output_class is not None or (text := self._told(message)) is None:
            return None
        try:
            value = parse_partial_json(text)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def _told(self, message: BaseMessage) -> str | None:
        if self.tool is None:
            return message.text
        chunks = message.tool_call_chunks if isinstance(message, AIMessageChunk) else []
        return chunks[0]["args"] if chunks else None

    def _whole(self, message: BaseMessage) -> Any:
        calls = message.tool_calls if isinstance(message, AIMessage) else []
        if self.tool is None:
            # With tools beside the format the model may call one instead; then there is no object.
            return None if calls and not message.text else self._object(message.text, _why(message))
        own = next((call for call in calls if call["name"] == self.tool), None)
        if own is None:
            raise OutputParserException(f"the reply does not call {self.tool}: {_why(message)}")
        return self._object(json.dumps(own["args"]), _why(message))

    def _object(self, text: str, why: str = "") -> Any:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = _NOTHING
        if value is _NOTHING or (why == _CUT and type(value) in (int, float)):  # of a number any beginning is one
            raise OutputParserException(f"the reply, {len(text)} characters, is not JSON: {why}")
        return value if self.output_class is None else _validated(self.output_class, text, value)


def _validated(cls: Any, text: str, value: Any) -> Any:
    try:
        return cls.model_validate_json(text) if issubclass(cls, pydantic.BaseModel) else cls.parse_obj(value)
    except (pydantic.ValidationError, pydantic.v1.ValidationError) as exc:
        problem = _places(exc, cls)
    raise OutputParserException(f"the reply, {len(text)} characters, is no {cls.__name__}: {problem}")


def _joined(said: BaseMessage | None, piece: str | BaseMessage) -> BaseMessage:
    chunk = AIMessageChunk(content=piece) if isinstance(piece, str) else piece
    return chunk if said is None else said + chunk  # type: ignore[return-value]


def _why(message: BaseMessage) -> str:
    cut = message.response_metadata.get("finish_reason") == "length"
    return _CUT if cut else "it ended otherwise than asked for"


def _places(exc: pydantic.ValidationError | pydantic.v1.ValidationError, cls: Any) -> str:
    """Which fields are wrong, and how, without what stands in them."""
    fields = cls.model_fields if issubclass(cls, pydantic.BaseModel) else cls.__fields__
    found = [(error["type"], str(error["loc"][0]) if error["loc"] else "") for error in exc.errors()]
    return ", ".join(f"{kind} in {place if place in fields else 'the object'}" for kind, place in found)
