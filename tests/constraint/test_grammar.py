"""grammar_of: what a reply may be, for every choice of tools, thoughts and answers; read back by the parser."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker import InvalidRequestError, ResponseFormat, ToolName, ToolSpec, UnsupportedFeatureError
from llama_worker._chat.analysis import format_of
from llama_worker._chat.calls import write_calls
from llama_worker._chat.format import CallSyntax, ChatFormat, ReasoningSyntax, Slot, Tagged, TextSyntax
from llama_worker._chat.parser import OutputParser
from llama_worker._constraint.compiler import ConstraintCompiler
from llama_worker._constraint.grammar import grammar_of
from llama_worker._constraint.kept import weight_of
from llama_worker._constraint.matcher import Constraint
from llama_worker._events import InvalidToolCall, ReasoningDelta, ReplyEvent, TextDelta, ToolCallEnded
from llama_worker._requests import ToolCall
from llama_worker.testing._tokenizer import IM_END
from tests.chat.formats import SYNTAXES
from tests.chat.templates import shipped_templates
from tests.constraint.walks import (
    PLAIN,
    PROOF,
    THINKING,
    MarkedVocabulary,
    allowed,
    constraint,
    fits,
    may_end,
    reply,
    request,
)

WEATHER = ToolSpec(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["c", "f"]},
            "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            "note": {"anyOf": [{"type": "string", "maxLength": 20}, {"type": "null"}]},
            "either": {"type": ["integer", "string"]},
        },
        "required": ["city", "days"],
    },
)
TIME = ToolSpec(name="get_time", parameters={})
SHORT = ToolSpec(name="get", parameters={"type": "object", "properties": {"x": {"type": "boolean"}}})
TOOLS = (WEATHER, TIME, SHORT)
CALL = '<tool_call>\n{"name": "get", "arguments": {"x": true}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'

TAGGED = Tagged(
    key_open="<parameter=",
    string_open=">\n",
    string_close="\n</parameter>\n",
    value_open=">\n",
    value_close="\n</parameter>\n",
)
FORMATS: dict[str, ChatFormat] = {
    "hermes": PLAIN,
    "thinking": THINKING,
    "xml": ChatFormat(
        digest="xml",
        origin="derived",
        calls=CallSyntax(
            call=("<tool_call>\n<function=", Slot.NAME, ">\n", Slot.ARGUMENTS, "</function>\n</tool_call>"),
            arguments=TAGGED,
            separator="\n",
            trigger="<tool_call>",
        ),
    ),
    "llama-3": ChatFormat(
        digest="llama-3",
        origin="derived",
        calls=CallSyntax(
            call=('{"name": "', Slot.NAME, '", "parameters": ', Slot.ARGUMENTS, "}"),
            trigger='{"name": "',
            only_at_start=True,
        ),
    ),
    "mistral": ChatFormat(
        digest="mistral",
        origin="derived",
        calls=CallSyntax(
            call=('{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, ', "id": "', Slot.ID, '"}'),
            section_open="[TOOL_CALLS][",
            separator=", ",
            section_close="]",
            trigger="[TOOL_CALLS]",
        ),
    ),
    "kimi": ChatFormat(
        digest="kimi",
        origin="derived",
        calls=CallSyntax(
            call=("<|call|>functions.", Slot.NAME, ":", Slot.INDEX, "<|args|>", Slot.ARGUMENTS, "<|end|>"),
            section_open="<|calls|>",
            separator="",
            section_close="<|/calls|>",
            trigger="<|calls|>",
        ),
    ),
    "a string of JSON": ChatFormat(
        digest="string",
        origin="derived",
        calls=CallSyntax(
            call=('<call>{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}</call>"),
            arguments="json_string",
            separator="\n",
            trigger="<call>",
        ),
    ),
    "harmony": ChatFormat(
        digest="harmony",
        origin="data",
        calls=CallSyntax(
            call=("<|channel|>commentary to=functions.", Slot.NAME, " <|message|>", Slot.ARGUMENTS),
            trigger="<|channel|>commentary to=functions.",
        ),
        reasoning=ReasoningSyntax(open="<|channel|>analysis<|message|>", close="<|end|><|start|>assistant"),
        text=TextSyntax(open="<|channel|>final<|message|>"),
    ),
    "typed tags": ChatFormat(
        digest="typed",
        origin="data",
        calls=CallSyntax(
            call=('<call tool="', Slot.NAME, '">', Slot.ARGUMENTS, "</call>"),
            arguments=Tagged(
                key_open='<arg key="',
                string_open='" type="string">',
                string_close="</arg>",
                value_open='" type="',
                value_close="</arg>",
                between="\n",
                type_close='">',
            ),
            separator="\n",
            trigger="<call",
        ),
        text=TextSyntax(open="<response>", close="</response>"),
    ),
    "a section whose end begins like its middle": ChatFormat(
        digest="dsml",
        origin="derived",
        calls=CallSyntax(
            call=('<invoke name="', Slot.NAME, '">\n', Slot.ARGUMENTS, "\n</invoke>"),
            arguments=Tagged(
                key_open='<parameter name="',
                string_open='" string="true">',
                string_close="</parameter>",
                value_open='" string="false">',
                value_close="</parameter>",
                between="\n",
            ),
            section_open="<calls>\n",
            separator="\n",
            section_close="\n</calls>",
            trigger="<calls>",
        ),
    ),
    "keys that close": ChatFormat(
        digest="keys",
        origin="derived",
        calls=CallSyntax(
            call=('<invoke name="', Slot.NAME, '">', Slot.ARGUMENTS, "</invoke>"),
            arguments=Tagged(
                key_open="<", string_open=">", string_close="</", value_open=">", value_close="</", key_again=">"
            ),
            trigger="<invoke",
        ),
    ),
    "nothing marks a call": ChatFormat(
        digest="functionary",
        origin="derived",
        calls=CallSyntax(call=(Slot.NAME, "\n", Slot.ARGUMENTS), separator=">>>", trigger="", only_at_start=True),
        text=TextSyntax(open="all\n"),
    ),
    "nothing marks a call, but behind a text": ChatFormat(
        digest="functionary behind text",
        origin="derived",
        calls=CallSyntax(
            call=(Slot.NAME, "\n", Slot.ARGUMENTS),
            separator=">>>",
            trigger="",
            only_at_start=True,
            behind_text=">>>",
        ),
        text=TextSyntax(open="all\n"),
    ),
    "control tokens around the name of a call behind a text": ChatFormat(
        digest="behind a control token",
        origin="derived",
        calls=CallSyntax(
            call=(Slot.NAME, "<|args|>", Slot.ARGUMENTS),
            separator="<|sep|>",
            trigger="",
            only_at_start=True,
            behind_text="<|sep|>",
        ),
        text=TextSyntax(open="all<|args|>"),
    ),
}
EVERY = pytest.mark.parametrize("name", FORMATS)


def read(format: ChatFormat, text: str, *, in_reasoning: bool = False) -> list[ReplyEvent]:
    count = itertools.count()
    parser = OutputParser(format, TOOLS, calls=True, in_reasoning=in_reasoning, new_id=lambda: f"call{next(count)}")
    return parser.feed(text) + parser.flush()


def calls_in(events: Sequence[ReplyEvent]) -> list[ToolCall | InvalidToolCall]:
    return [event.call for event in events if isinstance(event, ToolCallEnded)]


def vocabulary_of(format: ChatFormat) -> MarkedVocabulary:
    """With the tags between bars as control tokens, as models have them."""
    return MarkedVocabulary(
        re.findall(r"<[|｜][^<>\s]*?[|｜]>|\[[A-Z_]{4,}\]", repr(format).encode().decode("unicode_escape", "ignore"))
    )


def written(format: ChatFormat, *calls: tuple[str, dict[str, Any]]) -> str:
    assert format.calls is not None
    made = [
        ToolCall(id=f"abcdefgh{index}", name=name, arguments=arguments) for index, (name, arguments) in enumerate(calls)
    ]
    return write_calls(format.calls, made, TOOLS)


def test_nothing_to_constrain_is_no_grammar() -> None:
    assert grammar_of(request(), PLAIN, in_reasoning=False) is None
    assert grammar_of(request(tools=TOOLS, tool_choice="none"), PLAIN, in_reasoning=False) is None


def test_none_with_a_wanted_answer_is_that_answer() -> None:
    asked = request(tools=TOOLS, tool_choice="none", response_format=ResponseFormat(type="choice", choices=("a", "b")))
    assert fits(constraint(asked), "a")
    assert not fits(constraint(asked), CALL)


def test_tools_where_the_format_knows_none_are_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="tools"):
        grammar_of(request(tools=TOOLS), ChatFormat(digest="", origin="generic"), in_reasoning=False)


def test_required_is_a_call_from_the_first_token_on() -> None:
    asked = request(tools=TOOLS, tool_choice="required")
    assert bytes(constraint(asked).forced()) == b'<tool_call>\n{"name": "get'
    assert fits(constraint(asked), CALL)
    assert not fits(constraint(asked), "Hello")


def test_named_is_that_tool_alone() -> None:
    asked = request(tools=TOOLS, tool_choice=ToolName(name="get"))
    assert fits(constraint(asked), CALL)
    assert not fits(constraint(asked), OTHER)


def test_one_call_unless_several_are_asked_for() -> None:
    one, many = (request(tools=TOOLS, tool_choice="required", parallel_tool_calls=many) for many in (False, True))
    assert not fits(constraint(one), f"{CALL}\n{OTHER}")
    assert fits(constraint(many), f"{CALL}\n{OTHER}\n{CALL}")
    assert fits(constraint(many), CALL)


def test_auto_is_text_or_text_and_a_call() -> None:
    asked = request(tools=TOOLS)
    for text in ("", "Hello < tool_call", "No <tool_cal", CALL, f"Let me see.\n{CALL}"):
        assert fits(constraint(asked), text), text
    for text in ("<tool_call>nonsense", CALL.replace("true", "3"), CALL.replace("get", "gets"), f"{CALL} and more"):
        assert not fits(constraint(asked), text), text


def test_text_may_speak_of_the_trigger_where_it_counts_only_at_the_start() -> None:
    format = FORMATS["llama-3"]
    asked = request(tools=TOOLS)
    for text in ('I could say {"name": "nonsense"} but', "Hello", '{"nam', written(format, ("get", {"x": True}))):
        assert fits(constraint(asked, format), text), text
    for text in ('{"name": "nonsense"', ' \n{"name": "nonsense"'):
        assert not fits(constraint(asked, format), text), text


def test_thoughts_come_first_and_are_free() -> None:
    thought = "<think>\nI might write <tool_call> here.\n</think>\n\n"
    for choice in ("auto", "required"):
        assert fits(constraint(request(tools=TOOLS, tool_choice=choice), THINKING), thought + CALL)
        assert fits(constraint(request(tools=TOOLS, tool_choice=choice), THINKING), CALL)
    asked = request(response_format=ResponseFormat(type="json_object"))
    assert fits(constraint(asked, THINKING), thought + "{}")
    assert fits(constraint(asked, THINKING), "{}")
    assert not fits(constraint(asked, THINKING), thought)


def test_reply_that_begins_in_a_thought_must_close_it() -> None:
    asked = request(tools=TOOLS, tool_choice="required")
    assert fits(constraint(asked, THINKING, in_reasoning=True), f"so it is</think>\n\n{CALL}")
    assert not fits(constraint(asked, THINKING, in_reasoning=True), CALL)


def test_where_thinking_is_off_no_thought_is_begun() -> None:
    asked = request(tools=TOOLS, tool_choice="required", enable_thinking=False)
    assert not fits(constraint(asked, THINKING), f"<think>a</think>{CALL}")


def test_raw_prompt_is_continued_without_thoughts() -> None:
    asked = request(response_format=ResponseFormat(type="json_object")).model_copy(
        update={"messages": None, "prompt": "x"}
    )
    assert not fits(constraint(asked, THINKING), "<think>a</think>{}")


def test_text_that_begins_like_a_thought_is_none() -> None:
    """The parser reads a thought there, in which no call is looked for: so the grammar must not see text."""
    made = constraint(request(tools=TOOLS), THINKING)
    assert not fits(made, f"<think>never closed {CALL}")


def spells(made: Constraint, text: str) -> bool:
    """Whether `text` may be said in plain characters."""
    for byte in text.encode():
        if byte not in allowed(made):
            return False
        made.accept(byte)
    return True


MARKED = [name for name, format in FORMATS.items() if format.calls and format.calls.trigger[:2] in ("<|", "[T")]


@pytest.mark.parametrize("before", ["", " \n", "Sure. "])
@pytest.mark.parametrize("name", MARKED)
def test_text_does_not_spell_a_trigger_that_is_a_control_token(name: str, before: str) -> None:
    """The parser looks for characters: to it such a text would be a call, and one that no grammar held."""
    format = FORMATS[name]
    assert format.calls is not None
    compiler, trigger = ConstraintCompiler(vocabulary_of(format)), format.calls.trigger
    grammar = grammar_of(request(tools=TOOLS), format, in_reasoning=False)
    assert grammar is not None
    assert spells(compiler.constraint(grammar), before + trigger[:-1])
    assert not spells(compiler.constraint(grammar), before + trigger)


def test_marked_formats_are_among_those_of_these_tests() -> None:
    assert {"mistral", "kimi", "harmony"} <= set(MARKED)


MARKS = ChatFormat(
    digest="marks",
    origin="derived",
    calls=CallSyntax(
        call=("<|call|>", Slot.NAME, Slot.ARGUMENTS, "<|/call|>"),
        arguments=Tagged(
            key_open="<|key|>",
            string_open="<|string|>",
            string_close="<|/string|>",
            value_open="<|value|>",
            value_close="<|/value|>",
        ),
        trigger="<|call|>",
    ),
    reasoning=ReasoningSyntax(open="<|think|>", close="<|/think|>"),
    text=TextSyntax(open="<|text|>", close="<|/text|>"),
)


@pytest.mark.parametrize(
    ("said", "spelled"),
    [
        ("<|think|>hm ", "<|/think|>"),
        ("", "<|think|>"),
        ("", "<|text|>"),
        ("Hello.", "<|/text|>"),
        ("<|text|>Hello.", "<|/text|>"),
        ("<|call|>get_weather<|key|>city<|string|>Ulm", "<|/string|>"),
    ],
)
def test_no_tag_that_is_a_control_token_is_spelled_where_it_counts(said: str, spelled: str) -> None:
    vocabulary = vocabulary_of(MARKS)
    grammar = grammar_of(request(tools=(WEATHER,)), MARKS, in_reasoning=False)
    assert grammar is not None
    for text, may in ((spelled[:-1], True), (spelled, False)):
        made = ConstraintCompiler(vocabulary).constraint(grammar)
        for token in vocabulary.tokenize(said, add_special=False, parse_special=True).tolist():
            assert token in allowed(made)
            made.accept(token)
        assert spells(made, text) == may, text


@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "regex", "regex": "[a-z{}]+"}], ids=str)
def test_nothing_stands_behind_an_answer(form: dict[str, Any]) -> None:
    """What reads it takes all of it for the answer, a tag that closes texts too."""
    format = FORMATS["typed tags"]
    for tools in ((), TOOLS):
        asked = request(tools=tools, response_format=ResponseFormat(**form))
        assert fits(constraint(asked, format), "<response>{}")
        assert not fits(constraint(asked, format), "<response>{}</response>")
    assert fits(constraint(request(tools=TOOLS), format), "<response>{}</response>")


def test_tools_and_an_answer_are_either() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = request(tools=TOOLS, response_format=ResponseFormat(type="json_schema", json_schema=schema))
    assert fits(constraint(asked), '{"a": 1}')
    assert fits(constraint(asked), CALL)
    assert not fits(constraint(asked), "Hello")


def test_answer_as_a_regex_leaves_the_trigger_to_calls() -> None:
    asked = request(tools=TOOLS, response_format=ResponseFormat(type="regex", regex="[a-z_<>]+"))
    assert fits(constraint(asked), "abc<tool_call>")
    assert not fits(constraint(asked), "<tool_call>abc")
    assert fits(constraint(asked), CALL)


@pytest.mark.parametrize("property", ["name", "city"])
def test_answers_that_may_begin_like_a_call_are_refused(property: str) -> None:
    schema = {"type": "object", "properties": {property: {"type": "string"}}, "required": [property]}
    format = FORMATS["llama-3"]
    asked = request(tools=TOOLS, response_format=ResponseFormat(type="json_schema", json_schema=schema))
    if property == "name":
        with pytest.raises(InvalidRequestError, match="response_format"):
            constraint(asked, format)
        return
    assert fits(constraint(asked, format), '{"city": "x"}')
    assert fits(constraint(asked, format), written(format, ("get", {"x": True})))
    assert fits(constraint(asked, format), written(format, ("get_weather", {"city": "a", "days": 3})))
    assert not fits(constraint(asked, format), '{"name": "get", "parameters": {"x": 3}}')


@EVERY
def test_what_the_format_writes_is_accepted_and_wrong_types_are_not(name: str) -> None:
    format = FORMATS[name]
    vocabulary = vocabulary_of(format)
    compiler = ConstraintCompiler(vocabulary)
    assert format.calls is not None
    right = {"city": 'Zü "x" 5 < 6\nend', "days": 3, "unit": "f", "where": {"lat": -1.5}, "note": None, "either": 4}
    for choice in ("auto", "required"):
        grammar = grammar_of(request(tools=TOOLS, tool_choice=choice), format, in_reasoning=False)
        assert grammar is not None
        for call in (("get_weather", right), ("get", {}), ("get", {"x": False}), ("get_time", {})):
            assert fits(compiler.constraint(grammar), written(format, call), vocabulary), (choice, call)
        # Bounds of escaped numbers are checked when the call is whole.
        bounds: list[dict[str, Any]] = [] if format.calls.arguments == "json_string" else [{"days": 10}]
        for wrong in ({"days": "three"}, {"unit": "k"}, {"where": {"lat": "x"}}, *bounds):
            text = written(format, ("get_weather", {**right, **wrong}))
            assert not fits(compiler.constraint(grammar), text, vocabulary), (choice, wrong)
        assert not fits(compiler.constraint(grammar), written(format, ("get_weather", {"city": "a"})), vocabulary)


def test_behind_a_text_a_call_is_held_to_its_tool() -> None:
    format = FORMATS["nothing marks a call, but behind a text"]

    def taken(text: str, **more: Any) -> bool:
        return fits(constraint(request(tools=TOOLS, **more), format), text)

    assert taken("all\nHello")
    assert taken("all\n>>> print(1)\n>>>get_weathers\nx")
    assert taken('all\nHello\n>>>get\n{"x": true}')
    assert not taken('all\nHello\n>>>get\n{"x": 3}')
    assert not taken("all\nHello\n>>>get\nx")
    assert not taken('all\nHello\n>>>get\n{"x": true} and so on')
    two = 'all\nHello\n>>>get\n{"x": true}>>>get_time\n{}'
    assert taken(two, parallel_tool_calls=True)
    assert not taken(two)
    assert not taken('all\nHello\n>>>get\n{"x": true}', tool_choice="required")


def test_text_before_a_call_does_not_spell_the_control_tokens_around_its_name() -> None:
    format = FORMATS["control tokens around the name of a call behind a text"]
    grammar = grammar_of(request(tools=TOOLS), format, in_reasoning=False)
    assert grammar is not None
    vocabulary = vocabulary_of(format)
    compiler = ConstraintCompiler(vocabulary)
    assert fits(compiler.constraint(grammar), 'all<|args|>Hello<|sep|>get<|args|>{"x": true}', vocabulary)
    assert not fits(compiler.constraint(grammar), 'all<|args|>Hello<|sep|>get<|args|>{"x": 3}', vocabulary)
    for mark in ("<|sep|>", "<|args|>"):
        made = compiler.constraint(grammar)
        assert fits(made, "all<|args|>Hello ", vocabulary)
        assert spells(made, mark[:-1])
        assert not spells(made, ">")


@pytest.mark.parametrize(
    "name",
    ["nothing marks a call, but behind a text", "control tokens around the name of a call behind a text", "xml"],
)
def test_a_grammar_grows_with_its_tools_and_no_faster(name: str) -> None:
    def weight(n: int) -> int:
        tools = [WEATHER.model_copy(update={"name": f"tool_{index:03}"}) for index in range(n)]
        grammar = grammar_of(request(tools=tools, parallel_tool_calls=True), FORMATS[name], in_reasoning=False)
        assert grammar is not None
        return weight_of(grammar)

    assert weight(128) < 4.1 * weight(32)


_EITHER: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "types": ({"type": ["integer", "string"]}, ["a", "", 1], [1.5, [], None]),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["a", 1], [1.5, None]),
    "patterns": (
        {"anyOf": [{"type": "string", "pattern": "^a+$"}, {"enum": ["x", "y"]}, {"type": "integer"}, {"type": "null"}]},
        ["aa", "x", 1, None],
        ["b", 1.5, True],
    ),
    "enum": ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", 2]),
    "untyped": ({"title": "x"}, ["a", 1, None, {"a": [1]}], []),
}


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize("kinds", _EITHER)
@pytest.mark.parametrize("name", ["deepseek-tags", "typed", "gemma", "qwen-coder", "key-again", "json-strings"])
def test_what_may_be_a_string_or_not_is_held_to_its_schema_either_way(
    name: str, kinds: str, strict: bool | None
) -> None:
    schema, right, wrong = _EITHER[kinds]
    parameters = {"type": "object", "properties": {"p": schema}, "required": ["p"], "additionalProperties": False}
    tool = ToolSpec(name="t", parameters=parameters, strict=strict)
    format, syntax = ChatFormat(digest=name, origin="data", calls=SYNTAXES[name]), SYNTAXES[name]
    for value in (*right, *wrong):
        text = write_calls(syntax, [ToolCall(id="call00001", name="t", arguments={"p": value})], [tool])
        asked = request(tools=(tool,), tool_choice="required")
        assert fits(constraint(asked, format), text) == any(value is one for one in right), (value, text)


@EVERY
def test_several_calls_are_accepted_where_the_format_knows_several(name: str) -> None:
    format = FORMATS[name]
    vocabulary = vocabulary_of(format)
    text = written(format, ("get", {"x": True}), ("get_weather", {"city": "a", "days": 1}), ("get_time", {}))
    for many in (True, False):
        asked = request(tools=TOOLS, tool_choice="required", parallel_tool_calls=many)
        grammar = grammar_of(asked, format, in_reasoning=False)
        assert grammar is not None
        assert format.calls is not None
        made = ConstraintCompiler(vocabulary).constraint(grammar)
        assert fits(made, text, vocabulary) == (many and format.calls.separator is not None)


@EVERY
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_random_replies_are_text_or_valid_calls(name: str, choice: str) -> None:
    format = FORMATS[name]
    vocabulary = vocabulary_of(format)
    grammar = grammar_of(request(tools=TOOLS, tool_choice=choice, parallel_tool_calls=True), format, in_reasoning=False)
    assert grammar is not None
    compiler, ended = ConstraintCompiler(vocabulary), 0
    for seed in range(60 if PROOF else 6):
        made = compiler.constraint(grammar)
        text = reply(made, seed, pieces=vocabulary.pieces)
        if text is None:
            continue
        ended += 1
        events = read(format, text)
        calls = calls_in(events)
        assert choice == "auto" or calls, text
        for call in calls:
            assert isinstance(call, ToolCall), (text, call)
            wrong = made.checks.call(call.name, call.arguments)
            assert wrong is None or (name == "a string of JSON" and "imum" in wrong)
            (tool,) = (tool for tool in TOOLS if tool.name == call.name)
            assert set(call.arguments) <= set(tool.parameters.get("properties", {}))
        if choice == "required":
            assert not [event for event in events if isinstance(event, TextDelta)], text
    assert ended


@EVERY
def test_calls_in_thoughts_are_thoughts(name: str) -> None:
    format = FORMATS[name]
    if format.reasoning is None:
        return
    thought = f"{format.reasoning.open}a{format.reasoning.close}"
    vocabulary = vocabulary_of(format)
    grammar = grammar_of(request(tools=TOOLS, tool_choice="required"), format, in_reasoning=False)
    assert grammar is not None
    text = thought + written(format, ("get", {"x": True}))
    assert fits(ConstraintCompiler(vocabulary).constraint(grammar), text, vocabulary)
    events = read(format, text)
    assert [event.text for event in events if isinstance(event, ReasoningDelta)] == ["a"]
    assert len(calls_in(events)) == 1


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=30)
"""JSON need not escape DEL; llguidance wants it escaped."""


@settings(max_examples=300 if PROOF else 30, deadline=None)
@given(
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**15), 10**15) | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=8,
    ),
)
def test_any_arguments_that_fit_the_schema_can_be_written(city: str, anything: Any) -> None:
    tool = ToolSpec(
        name="t",
        parameters={
            "type": "object",
            "properties": {"city": {"type": "string"}, "any": {}},
            "required": ["city", "any"],
        },
    )
    for name in ("hermes", "xml"):
        format = FORMATS[name]
        assert format.calls is not None
        text = write_calls(format.calls, [ToolCall(id="", name="t", arguments={"city": city, "any": anything})], [tool])
        if name == "xml" and TAGGED.string_close in text.partition(city + TAGGED.string_close)[0] + city:
            continue
        assert fits(constraint(request(tools=(tool,), tool_choice="required"), format), text), text


@settings(max_examples=200 if PROOF else 25, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).map(str.strip).filter(bool),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_tools_of_any_name_can_be_called(names: list[str]) -> None:
    tools = tuple(ToolSpec(name=name) for name in names)
    for name in names:
        text = write_calls(PLAIN.calls, [ToolCall(id="", name=name, arguments={})], tools)  # type: ignore[arg-type]
        assert fits(constraint(request(tools=tools, tool_choice="required")), text)
        assert fits(constraint(request(tools=tools, tool_choice=ToolName(name=name))), text)


def test_tool_name_that_begins_with_a_blank_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as info:
        constraint(request(tools=(ToolSpec(name=" t"),)))
    assert info.value.field == "tools"


def test_every_shipped_template_accepts_its_calls_and_refuses_wrong_types() -> None:
    wrong: list[object] = []
    n = 0
    right = {"city": 'Zü "x" 5 < 6', "days": 3, "unit": "f", "where": {"lat": -1.5}}
    for name, template in shipped_templates().items():
        format = format_of(template)
        if format.calls is None:
            continue
        n += 1
        vocabulary = vocabulary_of(format)
        compiler = ConstraintCompiler(vocabulary)
        for choice in ("auto", "required"):
            grammar = grammar_of(request(tools=TOOLS, tool_choice=choice), format, in_reasoning=False)
            assert grammar is not None
            if not fits(compiler.constraint(grammar), written(format, ("get_weather", right)), vocabulary):
                wrong.append((name, choice, "refuses its own call"))
            if fits(compiler.constraint(grammar), written(format, ("get_weather", {**right, "days": "x"})), vocabulary):
                wrong.append((name, choice, "accepts a wrong type"))
    assert wrong == []
    assert n >= 60


def test_json_strings_hold_what_json_holds() -> None:
    made = constraint(request(response_format=ResponseFormat(type="json_object")))
    text = json.dumps({"a": 'quotes " and \\ and \n and \u2028', "ü": ["😀"]}, ensure_ascii=False)
    assert fits(made, text)


def test_end_is_never_allowed_inside_a_call() -> None:
    made = constraint(request(tools=TOOLS))
    assert may_end(made)
    for token in f"Well: {CALL}".encode()[:-1]:
        inside = not may_end(made) and IM_END not in allowed(made)
        made.accept(token)
        if token == ord(">") and inside:
            assert not may_end(made)
    made.accept(ord(">"))
    assert made.is_complete


TEXTS_WITH_RULES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a pattern": ({"pattern": "^[a-z]+$"}, "abc", "a1"),
    "a pattern anywhere": ({"pattern": "[0-9]"}, "a1b", "ab"),
    "a length": ({"minLength": 2, "maxLength": 3}, "abc", "abcd"),
    "a format": ({"format": "date"}, "2024-02-29", "2023-02-29"),
    "choices": ({"enum": ["north", "south"]}, "south", "east"),
    "a constant": ({"const": "x"}, "x", "y"),
    "a reference": ({"$ref": "#/$defs/short"}, "ab", "abc"),
}


@pytest.mark.parametrize("case", TEXTS_WITH_RULES)
@pytest.mark.parametrize("strict", [None, True])
def test_texts_that_stand_bare_keep_their_rules(case: str, strict: bool | None) -> None:
    schema, right, wrong = TEXTS_WITH_RULES[case]
    parameters = {
        "type": "object",
        "properties": {"p": schema if "$ref" in schema else {"type": "string", **schema}},
        "required": ["p"],
        "$defs": {"short": {"type": "string", "maxLength": 2}},
    }
    tool = ToolSpec(name="t", parameters=parameters, strict=strict)
    calls = FORMATS["xml"].calls
    assert calls is not None
    for text, fit in ((right, True), (wrong, False)):
        call = write_calls(calls, [ToolCall(id="", name="t", arguments={"p": text})], [tool])
        made = constraint(request(tools=(tool,), tool_choice="required"), FORMATS["xml"])
        assert fits(made, call) is fit, text


@pytest.mark.parametrize("rule", [{"format": "uri"}, {"pattern": "^a|b$"}])
def test_bare_text_with_a_rule_that_cannot_be_enforced_is_checked_or_with_strict_refused(rule: dict[str, str]) -> None:
    for strict in (None, True):
        parameters = {"type": "object", "properties": {"p": {"type": "string", **rule}}, "required": ["p"]}
        asked = request(tools=(ToolSpec(name="t", parameters=parameters, strict=strict),))
        if strict:
            with pytest.raises(InvalidRequestError) as info:
                constraint(asked, FORMATS["xml"])
            assert info.value.field == "tools.t.parameters"
        else:
            assert constraint(asked, FORMATS["xml"]).checks.call("t", {"p": "no uri"}) is not None


def test_bare_text_cannot_hold_what_closes_it_however_long_it_must_be() -> None:
    parameters = {"type": "object", "properties": {"p": {"type": "string", "minLength": 40}}, "required": ["p"]}
    tool = ToolSpec(name="t", parameters=parameters)
    calls = FORMATS["xml"].calls
    assert calls is not None
    text = f"short{TAGGED.string_close}and as long as it must be, with what stands before"
    call = write_calls(calls, [ToolCall(id="", name="t", arguments={"p": text})], [tool])
    assert not fits(constraint(request(tools=(tool,), tool_choice="required"), FORMATS["xml"]), call)


@EVERY
def test_parameters_declared_behind_a_reference_are_found(name: str) -> None:
    properties = {"n": {"type": "integer"}, "flag": {"type": ["boolean", "null"]}}
    body = {"type": "object", "properties": properties, "required": ["n"]}
    tool = ToolSpec(name="t", parameters={"$ref": "#/$defs/P", "$defs": {"P": body}})
    format = FORMATS[name]
    vocabulary = vocabulary_of(format)
    grammar = grammar_of(request(tools=(tool,), tool_choice="required"), format, in_reasoning=False)
    assert grammar is not None
    for arguments, fit in (({"n": 3}, True), ({"n": 3, "flag": None}, True), ({"n": True}, False), ({}, False)):
        text = written(format, ("t", arguments))
        assert fits(ConstraintCompiler(vocabulary).constraint(grammar), text, vocabulary) is fit, arguments


@pytest.mark.parametrize(
    "asked",
    [{"tools": TOOLS, "tool_choice": "required"}, {"response_format": ResponseFormat(type="json_object")}],
    ids=["a call", "an answer"],
)
def test_no_blank_leads_to_a_thought_that_nobody_chose(asked: dict[str, Any]) -> None:
    assert not any(ord(blank) in allowed(constraint(request(**asked), THINKING)) for blank in " \t\r\n")
    assert fits(
        constraint(request(**asked), THINKING), "<think>\nHm.\n</think>\n\n" + ("{}" if "tools" not in asked else CALL)
    )


def test_a_thought_and_a_call_that_begin_alike_are_both_open() -> None:
    held = constraint(request(tools=TOOLS, tool_choice="required"), THINKING)
    for token in b"<t":
        held.accept(token)
    assert allowed(held) == sorted(b"ho")
