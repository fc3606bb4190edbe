"""A text that must have a form: it has, or the reply says that it has not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_worker import (
    Failed,
    Finished,
    GenerationError,
    InvalidOutputError,
    InvalidRequestError,
    LlamaWorker,
    Message,
    ModelConfig,
    ResponseFormat,
)
from llama_worker._chat.analysis import format_of
from llama_worker._chat.template import ChatTemplate
from llama_worker._engine.base import Span
from llama_worker._engine.llama import load
from llama_worker.testing import assert_well_formed, fake_worker
from tests.worker.tools import QWEN, THINKER, TOOLS, WEATHER, assert_sound

ASK = [Message(role="user", content="Answer.")]
ROME = {"city": "Rome", "days": 3}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER["parameters"]}}

CASES: dict[str, tuple[Any, str, str]] = {
    "json_object": ({"type": "json_object"}, '{"a": [1, 2]}', '{"a": [1, 2]}'),
    "json_schema": (SCHEMA, json.dumps(ROME, separators=(" , ", ":")), json.dumps(ROME)),
    "choice": ({"type": "choice", "choices": ["left", "right"]}, "I go right", "right"),
    "regex": ({"type": "regex", "regex": "[0-9]+ km"}, "about 12 km", "12 km"),
    "lark": ({"type": "lark", "grammar": 'start: "<" /[a-z]+/ ">"'}, "<b>", "<b>"),
    "gbnf": ({"type": "gbnf", "grammar": 'root ::= "no" | "yes"'}, "yes", "yes"),
}


@pytest.mark.parametrize("prompt", [ASK, "Once upon"], ids=["chat", "raw"])
@pytest.mark.parametrize("case", CASES)
def test_the_text_has_its_form(case: str, prompt: Any) -> None:
    asked, script, text = CASES[case]
    with fake_worker(script) as worker:
        reply = worker.generate(prompt, response_format=asked, max_tokens=500)
        end = assert_well_formed(worker.stream(prompt, response_format=asked, max_tokens=500))
    assert (reply.text, reply.finish_reason) == (text, "stop")
    assert isinstance(end, Finished)
    assert end.text == text


def test_a_form_and_tools_give_one_or_the_other() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    with fake_worker(json.dumps(ROME), call, chat_template=QWEN, n_ctx=8192) as worker:
        text = worker.generate(ASK, tools=TOOLS, response_format=SCHEMA, max_tokens=500)
        called = worker.generate(ASK, tools=TOOLS, response_format=SCHEMA, max_tokens=500)
    assert (json.loads(text.text), text.tool_calls) == (ROME, ())
    assert (called.text, [call.name for call in called.tool_calls]) == ("", ["now"])
    assert_sound(called)


SPEAKS_OF_CALLS = 'see <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call> ok'
STRING = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
FORMS: dict[str, tuple[Any, str]] = {
    "json_schema": (
        {"type": "json_schema", "json_schema": {"name": "s", "schema": STRING, "strict": True}},
        json.dumps({"a": SPEAKS_OF_CALLS}),
    ),
    "regex": ({"type": "regex", "regex": "(?s:see .* ok)"}, SPEAKS_OF_CALLS),
    "choice": ({"type": "choice", "choices": [SPEAKS_OF_CALLS, "no"]}, SPEAKS_OF_CALLS),
    "lark": ({"type": "lark", "grammar": "start: /see (?s:.*) ok/"}, SPEAKS_OF_CALLS),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_speaks_of_a_call_calls_nothing(form: str) -> None:
    asked, answer = FORMS[form]
    with fake_worker(answer, chat_template=QWEN, n_ctx=8192) as worker:
        reply = worker.generate(ASK, tools=TOOLS, response_format=asked, max_tokens=500)
    assert (reply.text, reply.tool_calls, reply.invalid_tool_calls) == (answer, (), ())


WRAPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.tool_calls %}<tool_call>{{ m.tool_calls[0].function | tojson }}</tool_call>"
    "{% elif m.role == 'assistant' %}<response>{{ m.content }}</response>{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("opening", ["", "<response>"])
def test_an_answer_keeps_the_tags_that_stand_in_it(opening: str) -> None:
    found = format_of(ChatTemplate(WRAPPED, bos_text="", eos_text="")).text
    assert (found.open, found.close) == ("<response>", "</response>")
    asked, _ = FORMS["json_schema"]
    answer = json.dumps({"a": "it ends with </response> as <response> says"})
    with fake_worker(opening + answer, chat_template=WRAPPED) as worker:
        reply = worker.generate(ASK, response_format=asked, max_tokens=500)
    assert (reply.text, reply.finish_reason) == (answer, "stop")


BEGINS: dict[str, Any] = {
    "choice": {"type": "choice", "choices": ["MARKx", "no"]},
    "choice behind a line break": {"type": "choice", "choices": ["\nMARKx", "no"]},
    "lark": {"type": "lark", "grammar": 'start: "MARKx" | "no"'},
    "lark of any text": {"type": "lark", "grammar": "start: /(?s:.*)/"},
    "lark of any text that begins with <": {"type": "lark", "grammar": "start: /<(?s:.*)/"},
    "gbnf": {"type": "gbnf", "grammar": 'root ::= "MARKx" | "no"'},
}


def begins_with(mark: str, form: str) -> Any:
    return json.loads(json.dumps(BEGINS[form]).replace("MARK", mark))


@pytest.mark.parametrize("form", BEGINS)
@pytest.mark.parametrize(
    ("mark", "template"), [("<think>", QWEN), ("<response>", WRAPPED), ("<tool_call>", QWEN)], ids=lambda value: value
)
def test_an_answer_that_would_be_read_as_something_else_is_refused(mark: str, template: str, form: str) -> None:
    with fake_worker("no", chat_template=template, n_ctx=8192) as worker:
        asked = begins_with(mark, form)
        with pytest.raises(InvalidRequestError, match="begin") as caught:
            worker.generate(ASK, response_format=asked, tools=TOOLS, max_tokens=50)
        assert caught.value.field in ("response_format.choices", "response_format.grammar")
        assert worker.generate("raw", response_format=asked, max_tokens=50).text


@pytest.mark.parametrize("form", [form for form in BEGINS if "line break" not in form])
def test_an_answer_may_begin_with_the_tag_of_a_thought_where_none_can_begin(form: str) -> None:
    """Where thoughts are off, and behind the thought that the prompt has begun."""
    asked = begins_with("<think>", form)
    with fake_worker("<think>x", chat_template=QWEN, n_ctx=8192) as worker:
        off = worker.generate(ASK, response_format=asked, enable_thinking=False, max_tokens=50)
    with fake_worker("hm</think>\n\n<think>x", chat_template=THINKER, n_ctx=8192) as worker:
        behind = worker.generate(ASK, response_format=asked, max_tokens=50)
    assert (off.text, off.reasoning) == ("<think>x", "")
    assert (behind.text, behind.reasoning) == ("<think>x", "hm")


def test_a_text_cut_off_by_length_says_so() -> None:
    with fake_worker(json.dumps(ROME)) as worker:
        reply = worker.generate(ASK, response_format=SCHEMA, max_tokens=9)
    assert (reply.text, reply.finish_reason) == ('{"city": ', "length")


def test_thoughts_come_before_the_form() -> None:
    with fake_worker("<think>\nhm\n</think>\n\n" + json.dumps(ROME), chat_template=QWEN) as worker:
        reply = worker.generate(ASK, response_format=SCHEMA, max_tokens=500)
    assert (reply.reasoning, json.loads(reply.text)) == ("hm", ROME)


UNIQUE = {
    "type": "json_schema",
    "json_schema": {
        "name": "tags",
        "schema": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2, "maxItems": 2},
    },
}


def test_a_text_that_is_not_valid_is_an_error_with_the_reply() -> None:
    with fake_worker("[1, 1]", "[1, 2]") as worker:
        with pytest.raises(InvalidOutputError, match="uniqueItems") as caught:
            worker.generate(ASK, response_format=UNIQUE, max_tokens=100)
        assert isinstance(caught.value, GenerationError)
        assert caught.value.reply is not None
        assert (caught.value.reply.text, caught.value.reply.finish_reason) == ("[1, 1]", "stop")
        assert "[1, 1]" not in str(caught.value)
        assert worker.generate(ASK, response_format=UNIQUE, max_tokens=100).text == "[1, 2]"
        end = assert_well_formed(worker.stream(ASK, response_format=UNIQUE, max_tokens=100))
        assert isinstance(end, Failed)
        assert end.text == "[1, 1]"


def test_what_is_cut_off_is_not_checked() -> None:
    with fake_worker("[1, 1]") as worker:
        assert worker.generate(ASK, response_format=UNIQUE, max_tokens=4).finish_reason == "length"
        assert worker.generate(ASK, response_format=UNIQUE, stop=",").text == "[1"


@pytest.mark.parametrize(
    ("start", "error"),
    [("rest", InvalidRequestError), ("/[xyz]/ rest", GenerationError)],
    ids=["from the beginning", "behind a choice"],
)
def test_a_grammar_that_forces_tokens_without_end_fails_alone(start: str, error: type[Exception]) -> None:
    """Neither preparing nor the worker may follow it for ever."""
    with fake_worker("y") as worker:
        form = {"type": "lark", "grammar": f'start: {start}\nrest: "a" rest'}
        with pytest.raises(error):
            worker.generate(ASK, response_format=form, max_tokens=700)
        assert worker.generate(ASK).text == "y"


REFUSED: dict[str, Any] = {
    "no such type": {"type": "yaml"},
    "no schema": {"type": "json_schema"},
    "two forms": {"type": "regex", "regex": "a", "choices": ["a"]},
    "no regex": {"type": "regex", "regex": "((("},
    "no lark": {"type": "lark", "grammar": "start: ("},
    "no gbnf": {"type": "gbnf", "grammar": "root ::= ("},
    "no choices": {"type": "choice", "choices": []},
    "nothing fits": {"type": "json_schema", "json_schema": {"allOf": [{"type": "string"}, {"type": "number"}]}},
    "1 MB of enum": {"type": "json_schema", "json_schema": {"enum": [f"value {i:030d}" for i in range(30_000)]}},
    "itself": {"type": "json_schema", "json_schema": {"$ref": "#"}},
    "far away": {"type": "json_schema", "json_schema": {"$ref": "https://example.org/s.json"}},
}


@pytest.fixture(scope="module")
def refusing() -> Iterator[LlamaWorker]:
    with fake_worker("x") as worker:
        yield worker


@pytest.mark.parametrize("asked", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_at_once(refusing: LlamaWorker, asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        refusing.generate(ASK, response_format=asked, max_tokens=50)
    assert refusing.generate(ASK).text == "x"


def test_a_form_says_when_a_reply_ends(refusing: LlamaWorker) -> None:
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        refusing.generate(ASK, response_format=ResponseFormat(type="json_object"), ignore_eos=True)


@pytest.mark.engine
def test_logprobs_are_the_models_own_also_where_it_had_no_choice(tiny_llama: Path) -> None:
    """Scored by one cold pass over what was said: what the mask took away is not in them."""
    said = "water 77 then stone"
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_parallel=1, n_threads=1)
    form = {"type": "choice", "choices": [said, "x"]}
    with LlamaWorker(config) as worker:
        seeds = (worker.generate("Once", response_format=form, logprobs=2, seed=seed) for seed in range(20))
        reply = next(reply for reply in seeds if reply.text == said)
        prompt = worker._view().prompt_tokens("Once")
    tokens = np.array([entry.token for entry in reply.logprobs], np.int32)
    assert "".join(entry.text for entry in reply.logprobs) == said
    engine = load(config).engine
    engine.decode([Span(0, 0, prompt, True)])
    row = len(prompt) - 1
    for position, entry in enumerate(reply.logprobs):
        logits = engine.logits(row).astype(np.float64)
        own = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert abs(entry.logprob - own[entry.token]) < 0.05
        assert [token for token, _, _ in entry.top] == np.argsort(-own)[:2].tolist()
        engine.decode([Span(0, len(prompt) + position, tokens[position : position + 1], True)])
        row = 0
    engine.close()


@pytest.mark.engine
def test_bans_that_leave_nothing_fail_the_request_alone(tiny_llama: Path) -> None:
    """llama.cpp would end the process over a chain that chooses nothing."""
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_parallel=2, n_threads=1)
    with LlamaWorker(config) as worker:
        ids = {token for text in ("a", "b") for token in worker.tokenize(text)}
        banned = {
            token: float("-inf") for token, piece in enumerate(worker._view().vocabulary.pieces) if piece in b"ab"
        }
        assert ids <= set(banned)
        form = {"type": "regex", "regex": "[ab]{3}"}
        for temperature in (0.0, 1.0):
            with pytest.raises(GenerationError, match="no token was left"):
                worker.generate("Once", response_format=form, logit_bias=banned, temperature=temperature)
            assert worker.generate("Once", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
