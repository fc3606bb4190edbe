"""Answers that are not what they had to be: raised as one error, or told beside the raw reply."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from pydantic import BaseModel, field_validator
from pydantic.v1 import BaseModel as BaseModelV1

from langchain_llama_worker import ChatLlamaWorker
from llama_worker import GenerationError, InvalidOutputError, QueueFull
from llama_worker.testing import FakeEngine, Fault, fake_loader, fake_worker
from tests.adapters.langchain.test_calls import THINKER, Point, call, facts, model

METHODS: list[Any] = ["json_schema", "json_mode", "function_calling"]
TAGS = {
    "title": "Tags",
    "type": "object",
    "properties": {"tags": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}},
    "required": ["tags"],
}
DOUBLE = {"tags": ["a", "a"]}


class Tags(BaseModel):
    """Tags."""

    tags: set[str]


class TagsV1(BaseModelV1):
    """Tags."""

    tags: set[str]


class Near(Point):
    """A point near the origin."""

    @field_validator("x")
    @classmethod
    def _is_near(cls, value: int) -> int:
        if value > 9:
            raise ValueError("too far")
        return value


class Odd(Point):
    """A class whose own code fails."""

    def model_post_init(self, context: Any) -> None:
        raise KeyError("odd")


@tool
def keep(tags: set[str]) -> str:
    """Keeps tags."""
    return f"{type(tags).__name__}:{','.join(sorted(tags))}"


def written(method: str, name: str, value: dict[str, Any]) -> str:
    return call(name, **value) if method == "function_calling" else json.dumps(value)


async def four_ways(ask: Any) -> list[dict[str, Any]]:
    """What invoke, ainvoke, and the sums of both streams give."""
    answers: list[dict[str, Any]] = [ask.invoke("go"), await ask.ainvoke("go")]
    told: list[Any] = list(ask.stream("go"))
    heard: list[Any] = [chunk async for chunk in ask.astream("go")]
    for chunks in (told, heard):
        total = chunks[0]
        for chunk in chunks[1:]:
            total = total + chunk
        answers.append(total)
    return answers


async def raises_four_ways(ask: Any, check: Callable[[BaseException], Any]) -> None:
    async def stream() -> list[Any]:
        return [chunk async for chunk in ask.astream("go")]

    with pytest.raises(OutputParserException) as caught:
        ask.invoke("go")
    check(caught.value)
    with pytest.raises(OutputParserException) as caught:
        await ask.ainvoke("go")
    check(caught.value)
    with pytest.raises(OutputParserException) as caught:
        list(ask.stream("go"))
    check(caught.value)
    with pytest.raises(OutputParserException) as caught:
        await stream()
    check(caught.value)


# -- with the raw reply -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("method", METHODS)
async def test_a_good_answer_is_the_same_in_all_four_ways(method: Any, version: str | None) -> None:
    with model(written(method, "Point", {"x": 3, "y": 4}), output_version=version) as chat:
        answers = await four_ways(chat.with_structured_output(Point, method=method, include_raw=True))
    for answer in answers:
        assert set(answer) == {"raw", "parsed", "parsing_error"}
        assert (answer["parsed"], answer["parsing_error"]) == (Point(x=3, y=4), None)
        assert facts(answer["raw"]) == facts(answers[0]["raw"])


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("template", [None, THINKER], ids=["plain", "thoughts"])
@pytest.mark.parametrize("method", METHODS)
async def test_an_answer_that_the_worker_finds_invalid_stands_there_with_its_reply(
    method: Any, template: str | None, version: str | None
) -> None:
    reply = ("<think>\nhm\n</think>\n\n" if template else "") + written(method, "Tags", DOUBLE)
    with model(reply, template=template, output_version=version, logprobs=1) as chat:
        answers = await four_ways(chat.with_structured_output(TAGS, method=method, include_raw=True))
        name = chat.invoke("go").response_metadata["model_name"]
    for answer in answers:
        assert set(answer) == {"raw", "parsed", "parsing_error"}
        assert answer["parsed"] is None
        assert isinstance(answer["parsing_error"], OutputParserException)
        assert '"a"' not in str(answer["parsing_error"])
        raw = answer["raw"]
        assert isinstance(raw, AIMessage)
        assert raw.response_metadata["finish_reason"] == "stop"
        assert raw.usage_metadata is not None
        assert raw.usage_metadata["output_tokens"] > 0
        assert bool(raw.invalid_tool_calls) is (method == "function_calling")
        if method != "function_calling":
            assert isinstance(answer["parsing_error"], InvalidOutputError)
            assert json.loads(raw.text) == DOUBLE
            assert raw.response_metadata["model_name"] == name
            assert facts(raw) == facts(answers[0]["raw"])
        else:
            assert [c["name"] for c in raw.response_metadata["invalid_tool_calls"]] == ["Tags"]
            assert "uniqueItems" in raw.response_metadata["invalid_tool_calls"][0]["error"]


@pytest.mark.parametrize("cls", [Near, Near.model_json_schema()], ids=["class", "schema"])
@pytest.mark.parametrize("method", METHODS)
async def test_an_answer_that_is_cut_off_stands_there(method: Any, cls: Any) -> None:
    """Streamed, a growing guess must not stay as if it were the answer."""
    reply = written(method, "Near", {"x": 3, "y": 4444})
    with model(reply, max_tokens=reply.index("44") + 2) as chat:
        answers = await four_ways(chat.with_structured_output(cls, method=method, include_raw=True))
    for answer in answers:
        assert answer["parsed"] is None
        assert isinstance(answer["parsing_error"], OutputParserException)
        assert "cut off" in str(answer["parsing_error"])
        assert answer["raw"].response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize(("cls", "error"), [(Near, OutputParserException), (Odd, KeyError)])
@pytest.mark.parametrize("method", METHODS)
async def test_an_answer_that_its_class_refuses_stands_there(method: Any, cls: Any, error: type[Exception]) -> None:
    with model(written(method, cls.__name__, {"x": 30, "y": 4})) as chat:
        answers = await four_ways(chat.with_structured_output(cls, method=method, include_raw=True))
    for answer in answers:
        assert answer["parsed"] is None
        assert isinstance(answer["parsing_error"], error)


async def test_what_is_no_answer_at_all_is_raised() -> None:
    faults = [Fault("sample", GenerationError("a bad moment"), nth=n) for n in (1, 2)]
    with fake_worker(loader=fake_loader("Yes.", faults=faults)) as worker:
        ask: Any = ChatLlamaWorker(worker=worker).with_structured_output(Point, include_raw=True)
        with pytest.raises(GenerationError):
            ask.invoke("go")
        with pytest.raises(GenerationError):
            [chunk async for chunk in ask.astream("go")]


def test_the_raw_reply_comes_in_pieces_and_the_rest_once() -> None:
    with model('{"x": 3, "y": 4}') as chat:
        *raw, end = list(chat.with_structured_output(Point, include_raw=True).stream("go"))
    assert len(raw) > 3
    assert [set(chunk) for chunk in raw] == [{"raw"}] * len(raw)
    assert end == {"parsed": Point(x=3, y=4), "parsing_error": None}


def test_a_batch_tells_each_answer_for_itself() -> None:
    with model('{"tags": ["a", "a"]}', '{"tags": ["a", "b"]}') as chat:
        ask = chat.with_structured_output(TAGS, include_raw=True)
        answers: Any = ask.batch(["one", "two"], {"max_concurrency": 1})
    assert [answer["parsed"] for answer in answers] == [None, {"tags": ["a", "b"]}]
    assert [answer["parsing_error"] is None for answer in answers] == [False, True]


def test_without_streaming_the_reply_comes_in_one_piece() -> None:
    with model(json.dumps(DOUBLE), disable_streaming=True) as chat:
        raw, end = list(chat.with_structured_output(TAGS, include_raw=True).stream("go"))
    assert json.loads(raw["raw"].text) == DOUBLE
    assert isinstance(end["parsing_error"], OutputParserException)


def test_its_input_is_that_of_a_model() -> None:
    ask = ChatLlamaWorker(model="/nowhere/at-all.gguf").with_structured_output(Point, include_raw=True)
    assert ask.get_input_jsonschema()
    assert ask.get_graph().nodes


async def test_leaving_the_stream_cancels_the_request() -> None:
    engines = list[FakeEngine]()
    loader = fake_loader(json.dumps({"x": "y" * 100_000}), seen=engines.append)
    with fake_worker(loader=loader, n_ctx=200_000, n_parallel=1) as worker:
        ask: Any = ChatLlamaWorker(worker=worker).with_structured_output(None, method="json_mode", include_raw=True)
        told = ask.stream("go")
        assert set(next(told)) == {"raw"}
        told.close()
        worker.generate("x", max_tokens=1, timeout=30)
        async with aclosing(ask.astream("go")) as heard:
            assert set(await anext(heard)) == {"raw"}
        await worker.agenerate("x", max_tokens=1, timeout=30)
        assert engines[0].n_rows < 50_000


# -- without it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_an_invalid_answer_is_one_kind_of_error_whoever_finds_it(method: Any) -> None:
    def check(error: BaseException) -> None:
        assert '"a"' not in str(error)
        if method != "function_calling":
            assert isinstance(error, InvalidOutputError)
            assert isinstance(error.__cause__, InvalidOutputError)
            assert error.reply is not None
            assert json.loads(error.reply.text) == DOUBLE

    with model(written(method, "Tags", DOUBLE)) as chat:
        await raises_four_ways(chat.with_structured_output(TAGS, method=method), check)


def test_a_full_queue_is_none_of_these_errors() -> None:
    assert not issubclass(QueueFull, OutputParserException)


# -- sets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Tags, TagsV1])
@pytest.mark.parametrize("method", METHODS)
async def test_a_class_with_a_set_drops_doubles(method: Any, cls: Any) -> None:
    with model(written(method, cls.__name__, DOUBLE)) as chat:
        ask: Any = chat.with_structured_output(cls, method=method)
        assert ask.invoke("go") == await ask.ainvoke("go") == cls(tags={"a"})
        assert list(ask.stream("go")) == [cls(tags={"a"})]


def test_a_tool_with_a_set_is_called() -> None:
    with model(call("keep", tags=["a", "a"]), "Done.") as chat:
        state = create_agent(chat, [keep]).invoke({"messages": [{"role": "user", "content": "go"}]})
    assert [message.text for message in state["messages"] if message.type == "tool"] == ["set:a"]


def test_a_class_as_response_format_beside_tools_may_hold_doubles() -> None:
    with model(json.dumps(DOUBLE)) as chat:
        answer = chat.bind_tools([keep], response_format=Tags).invoke("go")
    assert Tags.model_validate_json(answer.text) == Tags(tags={"a"})
