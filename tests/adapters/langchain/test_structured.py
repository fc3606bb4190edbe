"""with_structured_output: what it binds, and what it makes of replies, whole, cut off and growing."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration
from langchain_core.runnables import RunnableBinding, RunnableSequence
from pydantic import BaseModel, RootModel, field_validator
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from langchain_llama_worker import ChatLlamaWorker
from langchain_llama_worker._structured import StructuredOutput
from llama_worker import InvalidRequestError

NOWHERE = "/nowhere/at-all.gguf"


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str

    @field_validator("punchline")
    @classmethod
    def _is_funny(cls, value: str) -> str:
        if "tax" in value:
            raise ValueError(f"{value} is not funny")
        return value


class JokeV1(BaseModelV1):
    """A joke."""

    setup: str
    punchline: str


class JokeDict(TypedDict):
    """A joke."""

    setup: Annotated[str, ..., "how it begins"]
    punchline: Annotated[str, ..., "how it ends"]


SCHEMA = {"title": "Joke", **JokeV1.schema()}
OPENAI_TOOL = {"type": "function", "function": {"name": "Joke", "description": "A joke.", "parameters": SCHEMA}}
SCHEMAS = {"pydantic": Joke, "pydantic.v1": JokeV1, "TypedDict": JokeDict, "schema": SCHEMA, "tool": OPENAI_TOOL}
WHOLE = '{"setup": "Why?", "punchline": "Because."}'
CUT = WHOLE[:-5]


def bound(schema: Any, **kwargs: Any) -> tuple[dict[str, Any], StructuredOutput]:
    chain = ChatLlamaWorker(model=NOWHERE).with_structured_output(schema, **kwargs)
    assert isinstance(chain, RunnableSequence)
    assert isinstance(chain.first, RunnableBinding)
    assert isinstance(chain.last, StructuredOutput)
    return dict(chain.first.kwargs), chain.last


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_the_text_is_held_to_the_schema(schema: Any, method: str) -> None:
    kwargs, _ = bound(schema, method=method)
    assert kwargs["ls_structured_output_format"] == {"kwargs": {"method": method}, "schema": schema}
    wanted = kwargs["response_format"]
    assert wanted["type"] == "json_schema"
    assert set(wanted["json_schema"]["schema"]["properties"]) == {"setup", "punchline"}
    assert "tools" not in kwargs


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_the_reply_is_one_call_of_the_schema(schema: Any) -> None:
    kwargs, parser = bound(schema, method="function_calling")
    assert kwargs["ls_structured_output_format"] == {"kwargs": {"method": "function_calling"}, "schema": schema}
    [tool] = kwargs["tools"]
    assert set(tool["function"]["parameters"]["properties"]) == {"setup", "punchline"}
    assert kwargs["tool_choice"] == {"type": "function", "function": {"name": tool["function"]["name"]}}
    assert kwargs["parallel_tool_calls"] is False
    assert parser.tool == tool["function"]["name"]


def test_json_mode_takes_any_object_when_there_is_no_schema() -> None:
    kwargs, _ = bound(None, method="json_mode")
    assert kwargs == {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize("strict", [True, False])
def test_strict_is_passed_on(strict: bool) -> None:
    assert bound(Joke, strict=strict)[0]["response_format"]["json_schema"]["strict"] is strict
    assert bound(Joke, strict=strict, method="function_calling")[0]["tools"][0]["function"]["strict"] is strict
    assert "strict" not in bound(Joke)[0]["response_format"]["json_schema"]


def test_a_schema_without_a_title_is_one_as_well() -> None:
    nameless = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert bound(nameless, method="function_calling")[0]["tools"][0]["function"]["parameters"] == nameless


def test_other_keywords_go_with_every_call() -> None:
    assert bound(Joke, temperature=0, seed=3)[0]["seed"] == 3
    with pytest.raises(InvalidRequestError, match="temprature"):
        bound(Joke, temprature=0)


@pytest.mark.parametrize(
    ("schema", "kwargs"),
    [(Joke, {"method": "xml"}), (None, {}), (7, {}), ("Joke", {})],
    ids=["method", "none", "7", "str"],
)
def test_what_cannot_be_meant_is_refused_at_once(schema: Any, kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        bound(schema, **kwargs)


class Color(enum.Enum):
    """No object."""

    RED = "red"


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
@pytest.mark.parametrize("cls", [Color, list, int, object, BaseModel, BaseModelV1, RootModel], ids=repr)
def test_a_class_without_fields_is_refused_with_the_way_out(cls: Any, method: str) -> None:
    """LangChain would make an object of what its constructor takes."""
    with pytest.raises(InvalidRequestError, match=f"schema='{cls.__name__}'.*give a pydantic class") as caught:
        bound(cls, method=method)
    assert caught.value.field == "schema"
    with pytest.raises(InvalidRequestError, match=r"response_format=.*give a pydantic class"):
        ChatLlamaWorker(model=NOWHERE, response_format=cls)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_dataclass_and_a_root_of_ones_own_have_fields(method: str) -> None:
    @dataclasses.dataclass
    class Place:
        """A place."""

        city: str

    class Places(RootModel[list[str]]):
        """Places."""

    for cls, key in ((Place, "properties"), (Places, "items")):
        kwargs = bound(cls, method=method)[0]
        [schema] = (
            [tool["function"]["parameters"] for tool in kwargs["tools"]]
            if method == "function_calling"
            else [kwargs["response_format"]["json_schema"]["schema"]]
        )
        assert key in schema


# -- reading ----------------------------------------------------------------------------------------


def said(text: str, reason: str = "stop") -> AIMessage:
    return AIMessage(text, response_metadata={"finish_reason": reason})


def called(args: dict[str, Any], name: str = "Joke") -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": "1"}])


PARTS = {"setup": "Why?", "punchline": "Because."}
PARSERS = {"text": StructuredOutput(), "class": StructuredOutput(output_class=Joke)}


def read(parser: StructuredOutput, message: AIMessage) -> Any:
    return parser.parse_result([ChatGeneration(message=message)])


@pytest.mark.parametrize(("cls", "expected"), [(None, PARTS), (Joke, Joke(**PARTS)), (JokeV1, JokeV1(**PARTS))])
def test_a_whole_reply_is_an_object(cls: Any, expected: Any) -> None:
    assert read(StructuredOutput(output_class=cls), said(WHOLE)) == expected
    assert read(StructuredOutput(output_class=cls), AIMessage([{"type": "text", "text": WHOLE}])) == expected
    assert read(StructuredOutput(output_class=cls, tool="Joke"), called(PARTS)) == expected
    assert StructuredOutput(output_class=cls).parse(WHOLE) == expected


@pytest.mark.parametrize("cls", [None, Joke, JokeV1])
def test_a_reply_that_was_cut_off_is_none(cls: Any) -> None:
    """LangChain's parsers would take it: the last text is only shorter."""
    with pytest.raises(OutputParserException, match=r"cut off; allow more max_tokens"):
        read(StructuredOutput(output_class=cls), said(CUT, "length"))
    broken = AIMessage(
        "",
        invalid_tool_calls=[{"name": "Joke", "args": CUT, "id": "1", "error": "cut off"}],
        response_metadata={"finish_reason": "length"},
    )
    with pytest.raises(OutputParserException, match=r"does not call Joke: it was cut off"):
        read(StructuredOutput(output_class=cls, tool="Joke"), broken)


def test_the_beginning_of_a_number_is_no_number() -> None:
    assert read(StructuredOutput(), said("1000")) == 1000
    assert read(StructuredOutput(), said("true", "length")) is True
    with pytest.raises(OutputParserException, match="cut off"):
        read(StructuredOutput(), said("10", "length"))


@pytest.mark.parametrize(
    ("message", "tool"),
    [
        (said('{"setup": "secret"}'), None),
        (said('{"setup": "x", "punchline": "secret tax"}'), None),
        (said("secret"), None),
        (said("[" * 100_000 + "secret"), None),
        (called({"setup": "x", "punchline": "secret tax"}), "Joke"),
        (called({"secret": 1}), "Joke"),
        (called(PARTS, "secret"), "Joke"),
    ],
)
def test_a_reply_that_is_no_such_object_is_named_and_not_quoted(message: AIMessage, tool: str | None) -> None:
    with pytest.raises(OutputParserException) as caught:
        read(StructuredOutput(output_class=Joke, tool=tool), message)
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_reply_that_calls_a_tool_instead_has_no_object() -> None:
    assert read(StructuredOutput(output_class=Joke), called({"city": "Rome"}, "weather")) is None


def pieces(text: str, *, call: bool, last: bool = True) -> list[BaseMessage]:
    chunks: list[BaseMessage] = []
    for i in range(0, len(text), 3):
        if call:
            name, call_id = ("Joke", "1") if i == 0 else (None, None)
            part = tool_call_chunk(name=name, args=text[i : i + 3], id=call_id, index=0)
            chunks.append(AIMessageChunk(content="", tool_call_chunks=[part]))
        else:
            chunks.append(AIMessageChunk(content=text[i : i + 3]))
    end = AIMessageChunk(content="", response_metadata={"finish_reason": "stop" if last else "length"})
    return [*chunks, end.model_copy(update={"chunk_position": "last"})]


async def each(items: list[BaseMessage]) -> AsyncIterator[BaseMessage]:
    for item in items:
        yield item


@pytest.mark.parametrize("call", [False, True], ids=["text", "call"])
async def test_a_dict_grows_and_an_object_comes_whole(call: bool) -> None:
    tool = "Joke" if call else None
    grown = list(StructuredOutput(tool=tool).transform(iter(pieces(WHOLE, call=call))))
    assert grown[-1] == PARTS
    assert len(grown) > 3
    assert all(len(str(a)) <= len(str(b)) for a, b in itertools.pairwise(grown))
    assert [x async for x in StructuredOutput(tool=tool).atransform(each(pieces(WHOLE, call=call)))] == grown
    jokes = list(StructuredOutput(output_class=Joke, tool=tool).transform(iter(pieces(WHOLE, call=call))))
    assert jokes == [Joke(**PARTS)]


@pytest.mark.parametrize("cls", [None, Joke])
async def test_a_stream_that_is_cut_off_ends_with_the_error(cls: Any) -> None:
    """LangChain's parsers end in silence, with the last guess as if it were the answer."""
    parser = StructuredOutput(output_class=cls)
    seen = list[Any]()
    with pytest.raises(OutputParserException, match="cut off"):
        seen.extend(parser.transform(iter(pieces(CUT, call=False, last=False))))
    assert not [value for value in seen if isinstance(value, Joke)]
    with pytest.raises(OutputParserException, match="cut off"):
        [x async for x in parser.atransform(each(pieces(CUT, call=False, last=False)))]


def test_a_stream_in_one_piece_is_read_as_well() -> None:
    """When streaming is switched off, what comes is a message and no chunk."""
    assert list(StructuredOutput().transform(iter([said(WHOLE)]))) == [PARTS]
    assert list(StructuredOutput(tool="Joke").transform(iter([called(PARTS)]))) == [PARTS]
    assert list(StructuredOutput(output_class=Joke).transform(iter([WHOLE]))) == [Joke(**PARTS)]
    assert list(StructuredOutput().transform(iter([]))) == []
