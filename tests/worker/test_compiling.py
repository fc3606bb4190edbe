"""Compiling a schema may take seconds: who asked for it waits, and nobody else."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llama_worker import Finished, LlamaWorker, Message, Reply
from llama_worker._constraint import compiler
from llama_worker.testing import assert_well_formed, fake_worker

ASK = [Message(role="user", content="Go on.")]
LONG = "all the while it speaks and speaks " * 10
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
WANTED = {"type": "json_schema", "json_schema": POINT}


class Watched:
    """llguidance's matcher; before one is made, `before` is called in the thread that makes it."""

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._real = compiler.LLMatcher

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._before()
        return self._real(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Held:
    """Holds up whoever compiles, and knows who did."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.names.append(threading.current_thread().name)
        self.begun.set()
        assert self.may_end.wait(30)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held()
    monkeypatch.setattr(compiler, "LLMatcher", Watched(held))
    return held


def in_thread(worker: LlamaWorker, replies: list[Reply]) -> None:
    replies.append(worker.generate(ASK, response_format=WANTED, max_tokens=50))


def on_a_loop(worker: LlamaWorker, replies: list[Reply]) -> None:
    replies.append(asyncio.run(worker.agenerate(ASK, response_format=WANTED, max_tokens=50)))


@pytest.mark.parametrize("ask", [in_thread, on_a_loop])
def test_while_a_schema_is_compiled_all_others_are_served(held: Held, ask: Callable[..., None]) -> None:
    replies: list[Reply] = []
    with fake_worker(LONG, "Yes.", json.dumps({"x": 3}), n_ctx=4096) as worker:
        stream = worker.stream(ASK)
        events = [next(stream)]
        caller = threading.Thread(target=ask, args=(worker, replies), name="the caller")
        caller.start()
        assert held.begun.wait(30)
        end = assert_well_formed([*events, *stream])
        assert worker.generate(ASK).text == "Yes."
        assert not replies
        held.may_end.set()
        caller.join(30)
    assert isinstance(end, Finished)
    assert end.text == LONG
    assert [json.loads(reply.text) for reply in replies] == [{"x": 3}]


@pytest.mark.parametrize("ask", [in_thread, on_a_loop])
def test_the_thread_that_decodes_compiles_nothing(held: Held, ask: Callable[..., None]) -> None:
    held.may_end.set()
    replies: list[Reply] = []
    with fake_worker(json.dumps({"x": 3}), n_ctx=4096) as worker:
        ask(worker, replies)
    expected = threading.current_thread().name if ask is in_thread else "prepare"
    assert held.names
    assert all(expected in name for name in held.names)
