"""Objects of a pydantic class as replies: asked for in the prompt, held to by the constraint, read from the text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Generic

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock
from llama_index.core.output_parsers.pydantic import PydanticOutputParser
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from llama_index.core.types import Model
from llama_index.llms.llama_worker._errors import UnusableReply
from llama_index.llms.llama_worker._schemas import demanded
from pydantic import ValidationError
from pydantic_core import from_json

from llama_worker import InvalidRequestError

_PROGRAMS_OWN = ("tool_choice", "tool_required", "allow_parallel_tool_calls")


def format_of(output_cls: type[Model]) -> dict[str, Any]:
    """The response_format of the class, in OpenAI's form."""
    return {"type": "json_schema", "json_schema": {"name": output_cls.__name__, "schema": demanded(output_cls)}}


def keywords_for(output_cls: type[Model], llm_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keywords of the chat that gives an object. What only LlamaIndex's own programs use is left out.

    Raises InvalidRequestError if they ask for another format.
    """
    given = {name: value for name, value in (llm_kwargs or {}).items() if name not in _PROGRAMS_OWN}
    for name in ("response_format", "grammar"):
        if given.get(name) is not None:
            raise InvalidRequestError(
                name, type(given[name]).__name__, f"the format is that of {output_cls.__name__}; leave it out"
            )
    return {**given, "response_format": format_of(output_cls)}


def with_schema(messages: Sequence[ChatMessage], output_cls: type[Model]) -> list[ChatMessage]:
    """The messages, with the schema told in the system message, or in the last if there is none.

    The constraint alone would force words on a model that knows nothing of them.
    """
    told = TextBlock(text=PydanticOutputParser(output_cls).get_format_string(escape_json=False).strip())
    if not messages:
        return [ChatMessage(role=MessageRole.USER, blocks=[told])]
    at = 0 if messages[0].role == MessageRole.SYSTEM else len(messages) - 1
    return [_and(message, told) if i == at else message for i, message in enumerate(messages)]


def _and(message: ChatMessage, block: TextBlock) -> ChatMessage:
    return message.model_copy(update={"blocks": [*message.blocks, block]})


def whole(response: ChatResponse, output_cls: type[Model]) -> Model:
    """The object that a response holds. Raises UnusableReply; its text never says what the reply was."""
    text = response.message.content or ""
    try:
        return output_cls.model_validate_json(text)
    except ValidationError as exc:
        problem = _problem(response.raw or {}, exc, output_cls)
    raise UnusableReply(f"the reply, {len(text)} characters, is no {output_cls.__name__}: {problem}") from None


def _problem(raw: Mapping[str, Any], exc: ValidationError, output_cls: type[Model]) -> str:
    if raw.get("finish_reason") == "length":
        return "it was cut off; allow more max_tokens"
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    places = {str(error["loc"][0]) if error["loc"] else "" for error in errors} & set(output_cls.model_fields)
    return f"{', '.join(sorted({error['type'] for error in errors}))} in {', '.join(sorted(places)) or 'the object'}"


class Growing(Generic[Model]):
    """An object that a stream writes: after each piece of text what there is of it, at the end itself.

    While fields are missing it is a flexible twin of the class, in which what is missing is None. Where LlamaIndex's
    own reader starts again from nothing at each key that is half written, this one keeps what it has.
    """

    def __init__(self, output_cls: type[Model]) -> None:
        self._output_cls = output_cls
        self._flexible = create_flexible_model(output_cls)

    def read(self, chunks: Generator[ChatResponse, None, None]) -> Generator[Model | FlexibleModel, None, None]:
        """Closes `chunks` when it is closed. Raises UnusableReply at the end of a stream that was not cancelled."""
        try:
            for chunk in chunks:
                yield from self._next(chunk)
        finally:
            chunks.close()

    async def aread(self, chunks: AsyncGenerator[ChatResponse, None]) -> AsyncGenerator[Model | FlexibleModel, None]:
        try:
            async for chunk in chunks:
                for known in self._next(chunk):
                    yield known
        finally:
            await chunks.aclose()

    def _next(self, chunk: ChatResponse) -> list[Model | FlexibleModel]:
        if chunk.raw is not None:
            return [] if chunk.raw["finish_reason"] == "cancelled" else [whole(chunk, self._output_cls)]
        return self._begun(chunk.message.content or "") if chunk.delta else []

    def _begun(self, text: str) -> list[Model | FlexibleModel]:
        try:
            value = from_json(text, allow_partial="trailing-strings")
        except ValueError:
            return []
        for cls in (self._output_cls, self._flexible):
            try:
                return [cls.model_validate(value)]
            except ValidationError:
                continue
        return []
