"""Hundreds of hot replies from a small model and from one without any sense: every call is valid, every text too."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from llama_worker import Finished, LlamaWorker, Message, ModelConfig, Reply, StreamEvent, ToolCall
from tests import synth
from tests.worker.tools import MAIL, QWEN, SCHEMAS, TOOLS, WEATHER, assert_sound, assert_sound_stream

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

N = 1000 if os.environ.get("LLAMA_WORKER_PROOF") else 100
SOME = max(25, N // 10)
"""For what is not counted: the demo model reads and writes a hundred tokens in a second of one core."""

HOT: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "reasoning_budget": 10}
"""Some of these templates let a model think first; one without sense would never come to an end of that."""


def chat(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def called_before() -> list[Message]:
    """A conversation in which tools were called: small models go on like that."""
    turns = chat("What is the weather in Rome?")
    for city in ("Rome", "Paris"):
        call = ToolCall(id=f"call{city}", name="get_weather", arguments={"city": city, "days": 1})
        turns.append(Message(role="assistant", content="", tool_calls=(call,)))
        turns.append(Message(role="tool", content="sunny", tool_call_id=call.id))
        turns.append(Message(role="assistant", content="It is sunny."))
        turns.append(Message(role="user", content="And in Oslo? Call the tool."))
    return turns


@pytest.fixture(scope="module", params=["smollm2", "random", "random-qwen"])
def worker(request: pytest.FixtureRequest, smollm2_path: Path, synth_folder: Path) -> Iterator[LlamaWorker]:
    """The demo model; random weights that know ChatML; random weights with a template that knows tools."""
    path = smollm2_path
    if request.param != "smollm2":
        path = synth.llama(synth_folder / f"{request.param}.gguf", seed=5)
    template = QWEN if request.param == "random-qwen" else None
    config = ModelConfig(
        model=str(path), n_ctx=4096, n_parallel=8, n_kv_cells=16_000, n_threads=1, chat_template=template
    )
    with LlamaWorker(config) as worker:
        yield worker


def replies(worker: LlamaWorker, n: int, prompt: str | list[Message], **asked: Any) -> list[Reply]:
    """Eight at a time, each with a seed of its own: what only some replies do, some do in every run."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda seed: worker.generate(prompt, seed=seed, **{**HOT, **asked}), range(n)))


def test_every_required_call_is_valid(worker: LlamaWorker) -> None:
    got = replies(worker, N, chat("Do something for me."), tools=TOOLS, tool_choice="required", max_tokens=1000)
    for reply in got:
        assert_sound(reply)
        assert (reply.finish_reason, len(reply.tool_calls), reply.text) == ("tool_calls", 1, "")
    assert len({call.id for reply in got for call in reply.tool_calls}) == N
    assert {call.name for reply in got for call in reply.tool_calls} == set(SCHEMAS), "all three are called"


def test_left_to_itself_it_writes_text_or_valid_calls(worker: LlamaWorker) -> None:
    got = replies(worker, SOME, called_before(), tools=TOOLS, max_tokens=60, temperature=1.0, top_k=40)
    for reply in got:
        assert_sound(reply)
    kinds = Counter("call" if reply.tool_calls or reply.invalid_tool_calls else "text" for reply in got)
    if "SmolLM2" in worker.info.name:
        assert kinds["call"] > 0, "it never called, so this shows nothing"


def test_hot_text_never_holds_a_broken_call(worker: LlamaWorker) -> None:
    for reply in replies(worker, SOME, called_before(), tools=TOOLS, max_tokens=60):
        assert_sound(reply)


def test_parallel_calls_are_valid_each(worker: LlamaWorker) -> None:
    most = 150 if "SmolLM2" in worker.info.name else 300  # without sense a string is spelled byte by byte
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": True, "max_tokens": most}
    got = replies(worker, 20, chat("Do several things."), **asked)
    for reply in got:
        assert_sound(reply)
        assert reply.tool_calls or reply.finish_reason == "length"
    assert any(len(reply.tool_calls) > 1 for reply in got)


def test_the_named_tool_is_called(worker: LlamaWorker) -> None:
    choice = {"type": "function", "function": {"name": "send_mail"}}
    for reply in replies(worker, SOME // 2, chat("Hi"), tools=TOOLS, tool_choice=choice, max_tokens=1000):
        assert_sound(reply)
        assert [call.name for call in reply.tool_calls] == ["send_mail"]


def test_told_not_to_it_calls_nothing(worker: LlamaWorker) -> None:
    for reply in replies(worker, SOME // 2, called_before(), tools=TOOLS, tool_choice="none", max_tokens=20):
        assert not reply.tool_calls
        assert not reply.invalid_tool_calls


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8, 13, 21, 34])
def test_a_call_that_is_cut_off_is_no_call(worker: LlamaWorker, max_tokens: int) -> None:
    for reply in replies(worker, 8, chat("Hi"), tools=[MAIL], tool_choice="required", max_tokens=max_tokens):
        assert_sound(reply)
        assert reply.usage.completion_tokens <= max_tokens
        assert reply.finish_reason == ("tool_calls" if reply.tool_calls else "length")


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_object": ({"type": "json_object"}, json.loads),
    "json_schema": (
        {"type": "json_schema", "json_schema": MAIL["parameters"]},
        lambda text: jsonschema_rs.validate(MAIL["parameters"], json.loads(text)),
    ),
    "regex": (
        {"type": "regex", "regex": "[A-Z]{3}-[0-9]{1,4}"},
        lambda text: re.fullmatch("[A-Z]{3}-[0-9]{1,4}", text),
    ),
    "choice": ({"type": "choice", "choices": ["yes", "no", "yes and no"]}, ["yes", "no", "yes and no"].index),
    "lark": (
        {"type": "lark", "grammar": 'start: "a" B~1..20 "c"\nB: /[0-9]/'},
        lambda text: re.fullmatch("a[0-9]{1,20}c", text),
    ),
    "gbnf": (
        {"type": "gbnf", "grammar": 'root ::= "x" [0-9]{1,20} "y"'},
        lambda text: re.fullmatch("x[0-9]{1,20}y", text),
    ),
}
LONG = ("json_object", "json_schema")
"""Of these some are cut off; the others are over before."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_what_it_has_to_be(worker: LlamaWorker, kind: str) -> None:
    asked, check = KINDS[kind]
    got: list[Reply] = []
    for prompt in (chat("Answer."), "Once upon"):
        budget = HOT["reasoning_budget"] if isinstance(prompt, list) else None
        got += replies(worker, max(5, N // 100), prompt, response_format=asked, max_tokens=100, reasoning_budget=budget)
    for reply in got:
        assert reply.finish_reason in ("stop", "length")
        if reply.finish_reason == "stop":
            assert check(reply.text) is not None or kind == "json_schema", reply.text
    ended = sum(reply.finish_reason == "stop" for reply in got)
    assert ended > 0 if kind in LONG else ended == len(got)


def test_with_tools_and_a_form_it_is_either(worker: LlamaWorker) -> None:
    form = {"type": "json_schema", "json_schema": WEATHER["parameters"]}
    got = replies(worker, SOME, chat("Rome"), tools=TOOLS, response_format=form, max_tokens=1000)
    for reply in got:
        assert_sound(reply)
        if reply.finish_reason == "stop":
            jsonschema_rs.validate(WEATHER["parameters"], json.loads(reply.text))
        else:
            assert not reply.text
    assert any(reply.finish_reason == "stop" for reply in got)


def test_streams_of_many_threads_and_loops_with_grammars_of_their_own(worker: LlamaWorker) -> None:
    """Different grammars share a batch; free text runs beside them; some leave in the midst of a call."""
    asked: list[dict[str, Any]] = [
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 600},
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": True, "max_tokens": 100},
        {"response_format": {"type": "regex", "regex": "(ab|cd){2,9}"}, "max_tokens": 60},
        {"tools": TOOLS, "max_tokens": 30},
        {"max_tokens": 30},
    ]
    ends: list[Finished] = []
    errors: list[BaseException] = []

    def read(number: int) -> None:
        with worker.stream(chat(f"Question {number}"), seed=number, **{**HOT, **asked[number % 5]}) as stream:
            seen: list[StreamEvent] = []
            for event in stream:
                seen.append(event)
                if number % 7 == 0 and len(seen) == 3:
                    stream.close()
        end = assert_sound_stream(seen)
        assert isinstance(end, Finished), end
        ends.append(end)

    async def aread(number: int) -> None:
        stream = worker.astream(chat(f"Question {number}"), seed=number, **{**HOT, **asked[number % 5]})
        seen = [event async for event in stream]
        end = assert_sound_stream(seen)
        assert isinstance(end, Finished), end
        ends.append(end)

    async def all_of(numbers: range) -> None:
        await asyncio.gather(*map(aread, numbers))

    def guard(task: Any, *args: Any) -> None:
        try:
            task(*args)
        except BaseException as exc:  # noqa: BLE001  the test shows it
            errors.append(exc)

    threads = [threading.Thread(target=guard, args=(read, number)) for number in range(20)]
    threads.append(threading.Thread(target=guard, args=(asyncio.run, all_of(range(20, 35)))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not any(thread.is_alive() for thread in threads), "somebody hangs"
    assert not errors, errors[:3]
    assert len(ends) == 35
    assert worker.status().state == "ready"
