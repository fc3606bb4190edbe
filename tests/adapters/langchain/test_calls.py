"""Tools, thoughts and formats through a worker: one answer whichever way it is asked for, and never half a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import LangChainException, OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerLLM
from llama_worker import InvalidRequestError
from llama_worker.testing import fake_worker

beta = pytest.mark.filterwarnings("ignore:.* is in beta")  # says langchain_core of what it is asked for here

THINKER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that knows thoughts and no tools."""


@tool
def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


@tool
def pay(to: str, amount: int) -> str:
    """Pays somebody."""
    return f"{amount} paid to {to}."


class Point(BaseModel):
    """A point."""

    x: int
    y: int


def call(name: str, **arguments: Any) -> str:
    """A call as a model writes it whose template knows no tools."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@contextmanager
def model(*replies: str, template: str | None = None, **fields: Any) -> Iterator[ChatLlamaWorker]:
    """A chat over a worker that answers with `replies` in turn."""
    with fake_worker(*replies, chat_template=template) as worker:
        yield ChatLlamaWorker(worker=worker, **fields)


def merged(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def facts(message: AIMessage) -> dict[str, Any]:
    """What must not depend on how the answer was asked for. Ids are new each time."""
    usage: dict[str, Any] = dict(message.usage_metadata or {})
    usage.pop("input_token_details", None)
    blocks = [
        {key: value for key, value in block.items() if key not in ("id", "index")} for block in message.content_blocks
    ]
    return {
        "text": message.text,
        "blocks": blocks,
        "calls": [(c["name"], c["args"]) for c in message.tool_calls],
        "usage": usage,
        "metadata": message.response_metadata,
    }


WEATHER = call("weather", city="Rome")
PAY = call("pay", to="bob", amount=1000)
SCRIPTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "text": ("It is fine.", {}, None),
    "a call under auto": (WEATHER, {}, None),
    "text and a call under auto": ("Let me see. " + WEATHER, {}, None),
    "a call that is required": (WEATHER, {"tool_choice": "any"}, None),
    "a call that is named": (PAY, {"tool_choice": "pay"}, None),
    "two calls": (f"{WEATHER}\n{PAY}", {"parallel_tool_calls": True}, None),
    "thoughts": ("<think>\nhm\n</think>\n\nYes.", {}, THINKER),
    "thoughts and a call": (f"<think>\nhm\n</think>\n\n{WEATHER}", {}, THINKER),
    "text where none may call": ("It is fine.", {"tool_choice": "none"}, None),
}


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize(("script", "asked", "template"), SCRIPTS.values(), ids=SCRIPTS)
async def test_the_four_ways_to_ask_give_one_answer(
    script: str, asked: dict[str, Any], template: str | None, version: str | None
) -> None:
    with model(script, template=template, output_version=version) as chat:
        bound = chat.bind_tools([weather, pay], **asked)
        invoked = facts(bound.invoke("go"))
        assert facts(await bound.ainvoke("go")) == invoked
        assert facts(merged(list(bound.stream("go")))) == invoked  # type: ignore[arg-type]
        assert facts(merged([c async for c in bound.astream("go")])) == invoked  # type: ignore[misc]
        assert facts(bound.invoke("go", stream=True)) == invoked


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("name", ["a call under auto", "a call that is required", "two calls", "thoughts and a call"])
def test_a_message_can_be_sent_back_as_it_came(name: str, version: str | None) -> None:
    script, asked, template = SCRIPTS[name]
    with model(script, "Done.", template=template, output_version=version) as chat:
        bound = chat.bind_tools([weather, pay], **asked)
        for answer in (bound.invoke("go"), merged(list(bound.stream("go")))):  # type: ignore[arg-type]
            results = [ToolMessage("It rains.", tool_call_id=c["id"], name=c["name"]) for c in answer.tool_calls]
            history: list[BaseMessage] = [HumanMessage("go"), answer, *results]
            assert chat.get_num_tokens_from_messages(history) > chat.get_num_tokens_from_messages(history[:1])
            assert isinstance(bound.invoke(history), AIMessage)


def test_what_a_call_says_is_what_was_asked_for() -> None:
    with model(*(script for script, _, _ in SCRIPTS.values() if script.startswith("Let me"))) as chat:
        answer = chat.bind_tools([weather]).invoke("go")
    assert answer.text.strip() == "Let me see."
    [called] = answer.tool_calls
    assert (called["name"], called["args"]) == ("weather", {"city": "Rome"})
    assert called["id"]
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert weather.invoke(called).content == "It rains in Rome."


def test_ids_of_calls_are_unique() -> None:
    with model(f"{WEATHER}\n{WEATHER}") as chat:
        bound = chat.bind_tools([weather], parallel_tool_calls=True)
        ids = [c["id"] for _ in range(3) for c in bound.invoke("go").tool_calls]
    assert len(ids) == len(set(ids)) == 6


def test_one_reply_holds_one_call_unless_more_are_asked_for() -> None:
    with model(f"{WEATHER}\n{WEATHER}") as chat:
        assert len(chat.bind_tools([weather]).invoke("go").tool_calls) == 1


def test_a_call_is_told_as_it_is_written() -> None:
    with model(WEATHER) as chat:
        chunks = list(chat.bind_tools([weather], tool_choice="any").stream("go"))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]  # type: ignore[attr-defined]
    assert pieces[0]["name"] == "weather"
    assert not pieces[0]["args"]
    assert len(pieces) > 5
    assert json.loads("".join(piece["args"] or "" for piece in pieces)) == {"city": "Rome"}


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("n", range(1, 90, 4))
async def test_however_a_call_is_cut_off_it_is_none(n: int, version: str | None) -> None:
    """In whatever way it is asked for, after whatever number of tokens."""
    with model(PAY, max_tokens=n, output_version=version) as chat:
        bound = chat.bind_tools([pay], tool_choice="any")
        answers = [bound.invoke("go"), merged(list(bound.stream("go"))), bound.invoke("go", stream=True)]  # type: ignore[arg-type]
        answers.append(merged([chunk async for chunk in bound.astream("go")]))  # type: ignore[misc]
    for answer in answers:
        if answer.response_metadata["finish_reason"] == "length" and answer.tool_calls == []:
            assert not [b for b in answer.content_blocks if b["type"] == "tool_call"]
        else:
            assert [c["args"] for c in answer.tool_calls] == [{"to": "bob", "amount": 1000}]
    assert len({len(answer.invalid_tool_calls) for answer in answers}) == 1


@beta
@pytest.mark.parametrize("n", [30, 40, 50, 60, 70])
def test_the_v3_events_tell_no_call_that_is_cut_off(n: int) -> None:
    with model(PAY, max_tokens=n) as chat:
        said = chat.bind_tools([pay], tool_choice="any").stream_events("go", version="v3").output
        assert said.tool_calls == chat.bind_tools([pay], tool_choice="any").invoke("go").tool_calls == []


@beta
@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize(("script", "asked", "template"), SCRIPTS.values(), ids=SCRIPTS)
async def test_the_v3_events_assemble_the_same_message(
    script: str, asked: dict[str, Any], template: str | None, version: str | None
) -> None:
    with model(script, template=template, output_version=version) as chat:
        bound = chat.bind_tools([weather, pay], **asked)
        invoked = facts(bound.invoke("go"))
        told = bound.stream_events("go", version="v3").output
        stream: Any = bound.astream_events("go", version="v3")
        for message in (told, await (await stream).output):
            assert message.text == invoked["text"]
            assert [(c["name"], c["args"]) for c in message.tool_calls] == invoked["calls"]
            kinds = [block["type"] for block in message.content_blocks]
            assert kinds == [block["type"] for block in invoked["blocks"]]
            assert message.response_metadata["finish_reason"] == invoked["metadata"]["finish_reason"]
            assert message.usage_metadata["output_tokens"] == invoked["usage"]["output_tokens"]


def test_thoughts_are_a_block_and_counted_and_not_text() -> None:
    with model("<think>\nlet me think\n</think>\n\nYes.", template=THINKER) as chat:
        answer = chat.invoke("go")
    assert answer.text == "Yes."
    assert answer.content_blocks == [
        {"type": "reasoning", "reasoning": "let me think"},
        {"type": "text", "text": "Yes."},
    ]
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0


def test_a_budget_ends_the_thoughts_and_the_answer_begins() -> None:
    script = "<think>\n" + "hm, " * 100 + "\n</think>\n\nYes."
    with model(script, template=THINKER) as chat:
        free, held = chat.invoke("go"), chat.invoke("go", reasoning_budget=20)
    assert free.usage_metadata is not None
    assert held.usage_metadata is not None
    assert held.usage_metadata["output_token_details"]["reasoning"] <= 40
    assert free.usage_metadata["output_token_details"]["reasoning"] > 400
    assert held.text


def test_streaming_can_be_switched_off_where_there_are_tools() -> None:
    with model(WEATHER, disable_streaming="tool_calling") as chat:
        [whole] = list(chat.bind_tools([weather], tool_choice="any").stream("go"))
        assert whole.tool_calls[0]["args"] == {"city": "Rome"}
        assert len(list(chat.stream("go"))) > 1


def test_a_cached_answer_belongs_to_its_tools_and_its_choice() -> None:
    with model(WEATHER, cache=InMemoryCache()) as chat:
        first = chat.bind_tools([weather], tool_choice="any").invoke("go")
        assert chat.bind_tools([weather], tool_choice="any").invoke("go").tool_calls == first.tool_calls
        assert chat.bind_tools([weather], tool_choice="none").invoke("go").tool_calls == []
        assert chat.bind_tools([pay], tool_choice="any").invoke("go").tool_calls[0]["name"] == "pay"


def test_a_tool_that_is_not_there_cannot_be_named() -> None:
    with model(WEATHER) as chat, pytest.raises(InvalidRequestError, match="the tools are weather") as caught:
        chat.bind_tools([weather], tool_choice="forecast").invoke("go")
    assert isinstance(caught.value, LangChainException)


# -- formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
async def test_an_object_comes_back_whichever_way_it_is_asked_for(method: str) -> None:
    arguments = {"x": 3, "y": 4}
    reply = call("Point", **arguments) if method == "function_calling" else json.dumps(arguments)
    with model(reply) as chat:
        ask: Any = chat.with_structured_output(Point, method=method)  # type: ignore[arg-type]
        assert ask.invoke("go") == await ask.ainvoke("go") == Point(x=3, y=4)
        assert list(ask.stream("go")) == [x async for x in ask.astream("go")] == [Point(x=3, y=4)]
        grown: Any = chat.with_structured_output(Point.model_json_schema(), method=method)  # type: ignore[arg-type]
        assert list(grown.stream("go"))[-1] == grown.invoke("go") == arguments
        raw = chat.with_structured_output(Point, method=method, include_raw=True).invoke("go")  # type: ignore[arg-type]
    assert raw["parsed"] == Point(x=3, y=4)
    assert raw["parsing_error"] is None
    assert isinstance(raw["raw"], AIMessage)


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_an_object_that_is_cut_off_is_an_error_and_not_another_object(method: str) -> None:
    reply = call("Point", x=3, y=4444) if method == "function_calling" else '{"x": 3, "y": 4444}'
    with model(reply, max_tokens=reply.index("44") + 2) as chat:
        ask: Any = chat.with_structured_output(Point, method=method)  # type: ignore[arg-type]
        with pytest.raises(OutputParserException, match="cut off"):
            ask.invoke("go")
        with pytest.raises(OutputParserException, match="cut off"):
            list(ask.stream("go"))
        raw = chat.with_structured_output(Point, method=method, include_raw=True).invoke("go")  # type: ignore[arg-type]
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)


def test_a_format_beside_tools_gives_calls_or_such_a_text() -> None:
    """As create_agent asks when its provider enforces formats."""
    wanted = {"type": "json_schema", "json_schema": {"name": "Point", "schema": Point.model_json_schema()}}
    with model(WEATHER, '{"x": 3, "y": 4}') as chat:
        bound = chat.bind_tools([weather], response_format=wanted)
        assert bound.invoke("go").tool_calls[0]["name"] == "weather"
        assert Point.model_validate_json(bound.invoke("go").text) == Point(x=3, y=4)


@pytest.mark.parametrize(
    ("wanted", "is_such"),
    [
        ({"type": "regex", "regex": "[0-9]{3}"}, lambda text: len(text) == 3 and text.isdigit()),
        ({"type": "choice", "choices": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"type": "gbnf", "grammar": 'root ::= "a" [bc]+ "d"'}, lambda text: text[0] == "a" and text[-1] == "d"),
        ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
        (Point, lambda text: set(json.loads(text)) == {"x", "y"}),
    ],
    ids=["regex", "choice", "gbnf", "json_object", "class"],
)
def test_what_the_text_must_be_it_is(wanted: Any, is_such: Callable[[str], bool]) -> None:
    with fake_worker('yes no abcd 123456 {"x": 1, "y": 2}') as worker:
        assert is_such(ChatLlamaWorker(worker=worker, response_format=wanted).invoke("go").text)
        assert is_such(ChatLlamaWorker(worker=worker).invoke("go", response_format=wanted).text)
        assert is_such(LlamaWorkerLLM(worker=worker, response_format=wanted).invoke("go"))
        assert is_such("".join(LlamaWorkerLLM(worker=worker).stream("go", response_format=wanted)))
