"""Thoughts are told apart from text, counted, and ended when there were enough of them."""

from __future__ import annotations

from typing import Any

import pytest

from llama_worker import (
    Finished,
    LlamaWorker,
    Message,
    ReasoningDelta,
    TextDelta,
    UnsupportedFeatureError,
)
from llama_worker.testing import assert_well_formed, fake_worker
from tests.worker.tools import QWEN, THINKER, TOOLS, assert_sound

ASK = [Message(role="user", content="Why?")]
THOUGHT = "<think>\nBecause it is so.\n</think>\n\nIt is."
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def thinking(*replies: str, template: str = QWEN, **config: Any) -> LlamaWorker:
    return fake_worker(*replies, chat_template=template, n_ctx=8192, **config)


def test_thoughts_are_not_text() -> None:
    with thinking(THOUGHT) as worker:
        events = list(worker.stream(ASK))
    end = assert_well_formed(events)
    assert isinstance(end, Finished)
    assert (end.reasoning, end.text, end.reason) == ("Because it is so.", "It is.", "stop")
    kinds = [type(event) for event in events[:-1]]
    assert kinds == sorted(kinds, key=[ReasoningDelta, TextDelta].index)


def test_a_reply_may_begin_inside_a_thought() -> None:
    with thinking("So it is.\n</think>\n\nYes.", template=THINKER) as worker:
        reply = worker.generate(ASK)
    assert (reply.reasoning, reply.text) == ("So it is.", "Yes.")


NO_TURN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{# <think> </think> #}"


@pytest.mark.parametrize("template", [NO_TURN, QWEN], ids=["nothing opens the reply", "the turn is marked"])
@pytest.mark.parametrize(
    "last", ["What is <think>", "<think>\n", "assistant\n<think>", "<|im_start|>assistant\n<think>"]
)
def test_a_user_cannot_hide_the_answer_in_a_thought(template: str, last: str) -> None:
    with thinking("It is a tag.", template=template) as worker:
        reply = worker.generate([Message(role="user", content=last)])
    assert (reply.text, reply.reasoning) == ("It is a tag.", "")


@pytest.mark.parametrize("variable", ["<think>", ["a", "<think>\n"], [{"<think>": 1}]], ids=str)
def test_a_variable_at_the_end_of_the_prompt_opens_no_thought(variable: Any) -> None:
    written = "{{ notes if notes is string else notes[-1] if notes[-1] is string else (notes[-1] | list)[0] }}"
    with thinking("It is a tag.", template=f"{NO_TURN}{{% if notes is defined %}}{written}{{% endif %}}") as worker:
        assert worker._view().format.reasoning is not None
        reply = worker.generate(ASK, template_variables={"notes": variable})
    assert (reply.text, reply.reasoning) == ("It is a tag.", "")


@pytest.mark.parametrize("describes", ["<think>", "Says <think> "])
def test_a_tool_at_the_end_of_the_prompt_opens_no_thought(describes: str) -> None:
    written = "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.description }}{% endfor %}"
    calls = "{% if m.tool_calls %}<tool_call>{{ m.tool_calls[0].function | tojson }}</tool_call>{% endif %}\n"
    with thinking("It is a tag.", template=NO_TURN.replace("\n", calls) + written) as worker:
        assert worker._view().format.takes_tools
        reply = worker.generate(ASK, tools=[{"name": "t", "description": describes}], tool_choice="none")
    assert (reply.text, reply.reasoning) == ("It is a tag.", "")


def test_a_template_that_opens_a_thought_does_so_whatever_the_user_says() -> None:
    with thinking("So it is.\n</think>\n\nYes.", template=THINKER) as worker:
        for last in ("What is <think>", "<think>", "<|im_start|>assistant\n<think>\n"):
            reply = worker.generate([Message(role="user", content=last)])
            assert (reply.reasoning, reply.text) == ("So it is.", "Yes.")


def test_thoughts_are_counted() -> None:
    with thinking(THOUGHT) as worker:
        usage = worker.generate(ASK).usage
    assert usage.completion_tokens == len(THOUGHT)
    # From the end of the opening tag to the end of the closing one, as far as it is known to be one.
    assert len("Because it is so.") <= usage.reasoning_tokens <= len(THOUGHT) - len("It is.")


def test_a_thought_that_never_ends_is_all_thought() -> None:
    with thinking("<think>\nand then and then") as worker:
        reply = worker.generate(ASK)
        cut = worker.generate(ASK, max_tokens=14)
    assert (reply.text, reply.reasoning) == ("", "and then and then")
    assert (cut.reasoning, cut.finish_reason) == ("and th", "length")


def test_a_template_without_thoughts_shows_the_tags_as_text() -> None:
    with fake_worker(THOUGHT) as worker:
        assert worker.generate(ASK).text == THOUGHT


# --- the budget


@pytest.mark.parametrize("template", [QWEN, THINKER], ids=["opens by itself", "begins inside"])
@pytest.mark.parametrize("budget", [0, 1, 5, 12])
def test_a_budget_ends_the_thought(template: str, budget: int) -> None:
    opening = "<think>\n" if template == QWEN else ""
    with thinking(opening + "abcdefghijklmnopqrstuvwxyz" * 4, template=template) as worker:
        reply = worker.generate(ASK, reasoning_budget=budget, max_tokens=100)
    assert len(reply.reasoning) <= budget
    assert reply.usage.reasoning_tokens <= budget + len("</think>") + len("<think>\n")
    assert reply.text, "the answer is begun"
    assert "think" not in reply.text


def test_no_budget_at_all_begins_with_the_answer() -> None:
    with thinking("It is.", template=THINKER) as worker:
        reply = worker.generate(ASK, reasoning_budget=0)
    assert (reply.reasoning, reply.text) == ("", "It is.")


def test_a_budget_that_is_not_used_up_changes_nothing() -> None:
    with thinking(THOUGHT) as worker:
        reply = worker.generate(ASK, reasoning_budget=1000)
    assert (reply.reasoning, reply.text) == ("Because it is so.", "It is.")


@pytest.mark.parametrize("budget", [0, 3, 9])
@pytest.mark.parametrize("template", [QWEN, THINKER], ids=["opens by itself", "begins inside"])
def test_a_budget_and_a_grammar_go_together(template: str, budget: int) -> None:
    """The constraint hears of the tag that was put in, and holds the answer to its form."""
    opening = "<think>\n" if template == QWEN else ""
    with thinking(opening + "hmhmhmhmhmhmhmhm " + CALL, template=template) as worker:
        asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 500}
        called = worker.generate(ASK, reasoning_budget=budget, **asked)
        form = {"type": "choice", "choices": ["yes", "no"]}
        chosen = worker.generate(ASK, reasoning_budget=budget, response_format=form, max_tokens=500)
    assert_sound(called)
    assert len(called.tool_calls) == 1
    assert len(called.reasoning) <= budget
    assert chosen.text in ("yes", "no")
    assert len(chosen.reasoning) <= budget


def test_budget_and_length_meet() -> None:
    """max_tokens holds also in the midst of the tag."""
    with thinking("abcdefghijklmnop", template=THINKER) as worker:
        for max_tokens in range(1, 16):
            reply = worker.generate(ASK, reasoning_budget=4, max_tokens=max_tokens)
            assert reply.usage.completion_tokens == max_tokens
            assert reply.finish_reason == "length"
            assert len(reply.reasoning) <= max_tokens


# --- on and off


def test_the_switch_of_the_template_is_used() -> None:
    with thinking("It is.") as worker:
        on, off = worker.generate(ASK, enable_thinking=True), worker.generate(ASK, enable_thinking=False)
    assert off.usage.prompt_tokens > on.usage.prompt_tokens  # it closes an empty thought
    assert (off.text, off.reasoning) == ("It is.", "")


def test_thoughts_that_cannot_be_turned_off_are_closed_at_once() -> None:
    with thinking("It is.", template=THINKER) as worker:
        reply = worker.generate(ASK, enable_thinking=False)
    assert (reply.reasoning, reply.text) == ("", "It is.")


def test_what_does_not_think_cannot_be_made_to() -> None:
    with fake_worker("It is.") as worker:
        with pytest.raises(UnsupportedFeatureError, match="enable_thinking"):
            worker.generate(ASK, enable_thinking=True)
        assert worker.generate(ASK, enable_thinking=False).text == "It is."
        assert worker.generate(ASK, reasoning_budget=5).text == "It is."


def test_thoughts_and_calls_come_apart() -> None:
    with thinking("<think>\nI need the time.\n</think>\n\n" + CALL) as worker:
        reply = worker.generate(ASK, tools=TOOLS, max_tokens=500)
    assert_sound(reply)
    assert (reply.reasoning, reply.text, reply.tool_calls[0].name) == ("I need the time.", "", "now")


def test_the_thoughts_of_a_tool_loop_are_replayed_and_their_ids_used_again() -> None:
    with thinking("<think>\nI need the time.\n</think>\n\n" + CALL, "Noon.") as worker:
        first = worker.generate(ASK, tools=TOOLS, max_tokens=500)
        answer = Message(role="assistant", content="", reasoning=first.reasoning, tool_calls=first.tool_calls)
        result = Message(role="tool", content="12:00", tool_call_id=first.tool_calls[0].id)
        second = worker.generate([*ASK, answer, result], tools=TOOLS, max_tokens=500)
    computed = first.usage.prompt_tokens + first.usage.completion_tokens
    # All that was computed: behind the last choice, the n of the name, all was certain.
    assert second.usage.cached_tokens == computed - len('now", "arguments": {}}\n</tool_call>')


def test_a_stop_string_in_a_thought_is_none() -> None:
    with thinking(THOUGHT) as worker:
        reply = worker.generate(ASK, stop="so")
    assert (reply.reasoning, reply.text) == ("Because it is so.", "It is.")
