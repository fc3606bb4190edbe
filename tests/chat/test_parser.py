"""What a reply says is read as it comes: text, thoughts and calls; whatever is wrong with it, nothing is raised."""

from __future__ import annotations

import json
from functools import partial

import pytest

from llama_worker._chat.calls import write_calls
from llama_worker._chat.format import ChatFormat, TextSyntax
from llama_worker._events import (
    InvalidToolCall,
    ReasoningDelta,
    ReplyEvent,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)
from llama_worker._requests import ToolCall
from tests.chat.formats import (
    ARGUMENTS_FIRST,
    BEHIND_TEXT,
    COHERE,
    GEMMA,
    HERMES,
    KIMI,
    LLAMA,
    MISTRAL,
    QWEN_CODER,
    SYNTAXES,
    TEXT_ARGUMENTS,
    TOOLS,
    TYPED,
    UNMARKED,
    format_with,
)
from tests.chat.parsing import ended, every_way, parser, run, said, text_of, thought_of

WITH_HERMES = format_with(HERMES)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
CUT = "the reply ended before the call was complete"


def read(
    text: str, format: ChatFormat = WITH_HERMES, *, calls: bool = True, thinking: bool = False
) -> list[ReplyEvent]:
    return every_way(partial(parser, format, calls=calls, in_reasoning=thinking), text)


def read_answer(text: str, format: ChatFormat) -> list[ReplyEvent]:
    return every_way(partial(parser, format, answers=True), text)


# ---- answers that have a form

ANSWERED = format_with(HERMES, text=TextSyntax(open="<response>", close="</response>"))


@pytest.mark.parametrize("answer", ['{"a": "%s"}', "see %s ok", "[%s", "x\n%s"])
@pytest.mark.parametrize("said", [CALL, "<tool_call>", "</response>", "<response>", "<think>a</think>"])
@pytest.mark.parametrize("before", ["", "<response>", "<think>hm</think>\n\n", "<think>hm</think><response>"])
def test_an_answer_is_text_to_its_end(answer: str, said: str, before: str) -> None:
    text = answer.replace("%s", said)
    events = read_answer(before + text, ANSWERED)
    assert text_of(events) == text
    assert thought_of(events) == ("hm" if "hm" in before else "")
    assert not ended(events)


@pytest.mark.parametrize("before", ["", "<think>hm</think>\n\n"])
def test_a_call_in_place_of_an_answer_is_one(before: str) -> None:
    events = read_answer(before + CALL, ANSWERED)
    assert list(map(said, ended(events))) == [("get_weather", {"city": "Ulm"})]
    assert text_of(events) == ""


# ---- text and thoughts


@pytest.mark.parametrize(
    ("text", "thinking", "thought", "said_text"),
    [
        ("hello", False, "", "hello"),
        ("  hello \n", False, "", "  hello \n"),
        (" \n", False, "", " \n"),
        ("", False, "", ""),
        ("<think>\nhm\n</think>\n\nHi.", False, "hm", "Hi."),
        ("\n<think>hm</think>Hi.\n", False, "hm", "Hi.\n"),
        ("hm \n </think>\n\nHi.", True, "hm", "Hi."),
        ("<think></think>Hi.", False, "", "Hi."),
        ("<think> \n </think>\n", False, "", ""),
        ("<think>one</think>\n<think>two</think>Hi.", False, "onetwo", "Hi."),
        ("<think>never closed, a < b ", False, "never closed, a < b ", ""),
        ("never closed </thi", True, "never closed </thi", ""),
        ("<thi", False, "", "<thi"),
        ("<thing>", False, "", "<thing>"),
        ("Write <think> and </think>.", False, "", "Write <think> and </think>."),
        ("</think>Hi.", False, "", "</think>Hi."),
        ("<think>a</thin</think>b", False, "a</thin", "b"),
    ],
)
def test_thoughts_are_told_apart_from_text(text: str, thinking: bool, thought: str, said_text: str) -> None:
    events = read(text, thinking=thinking)
    assert (thought_of(events), text_of(events)) == (thought, said_text)


def test_without_a_syntax_for_thoughts_tags_are_text() -> None:
    assert read("<think>a</think>b", format_with(HERMES, None), thinking=True) == [TextDelta("<think>a</think>b")]


def test_it_is_known_at_every_moment_whether_it_is_thinking() -> None:
    one = parser(WITH_HERMES)
    states = []
    for piece in ("\n", "<thi", "nk>", "hm", "</think", ">", "Hi"):
        one.feed(piece)
        states.append(one.in_reasoning)
    assert states == [False, False, True, True, True, False, False]
    assert parser(WITH_HERMES, in_reasoning=True).in_reasoning


@pytest.mark.parametrize(
    ("text", "said_text"),
    [
        ("<|text|>Hi.<|end|>", "Hi."),
        ("Hi.<|end|>", "Hi."),
        ("<think>a</think>\n<|text|>Hi <|text|>.", "Hi <|text|>."),
        ("<|text|><|end|>", ""),
        ("<|text|>a<|en", "a<|en"),
        ("<|text|>Hi.<|end|>\n" + CALL, "Hi."),
    ],
)
def test_what_stands_around_marked_text_is_no_text(text: str, said_text: str) -> None:
    format = format_with(HERMES, text=TextSyntax(open="<|text|>", close="<|end|>"))
    assert text_of(read(text, format)) == said_text


def test_text_is_held_back_only_where_a_marker_may_begin() -> None:
    one = parser(WITH_HERMES)
    assert one.feed("Hello") == [TextDelta("Hello")]
    assert one.feed(" a < b") == [TextDelta(" a < b")]
    assert one.feed(" <tool_") == [TextDelta(" ")]
    assert one.feed("box>") == [TextDelta("<tool_box>")]
    assert one.feed("\n") == [TextDelta("\n")]


def test_thoughts_are_held_back_only_for_their_blanks_and_the_closing_tag() -> None:
    one = parser(WITH_HERMES, in_reasoning=True)
    assert [one.feed(piece) for piece in ("\n", "a", " ", "b</", "c", " \n</think", ">", "\n", "d")] == [
        [],
        [ReasoningDelta("a")],
        [],
        [ReasoningDelta(" b")],
        [ReasoningDelta("</c")],
        [],
        [],
        [],
        [TextDelta("d")],
    ]


# ---- calls


def test_a_call_is_told_as_it_comes() -> None:
    """The name as soon as it is certain, the arguments piece by piece, the call when all of it was read."""
    one = parser(WITH_HERMES)
    pieces = [
        "<tool_call>",
        '\n{"name": "get',
        "_weather",
        '", "argu',
        'ments": {"ci',
        'ty": "Ulm"}',
        "}\n</tool_",
        "call>",
    ]
    assert [one.feed(piece) for piece in pieces] == [
        [],
        [],
        [],
        [ToolCallStarted(index=0, id="call_0", name="get_weather")],
        [ToolCallDelta(index=0, arguments='{"ci')],
        [ToolCallDelta(index=0, arguments='ty": "Ulm"}')],
        [],
        [ToolCallEnded(index=0, call=ToolCall(id="call_0", name="get_weather", arguments={"city": "Ulm"}))],
    ]


def test_where_the_arguments_stand_first_the_name_is_told_before_them() -> None:
    events = read(
        '<tool_call>{"arguments": {"city": "Ulm"}, "name": "get_weather"}</tool_call>', format_with(ARGUMENTS_FIRST)
    )
    assert [type(event) for event in events] == [ToolCallStarted, ToolCallDelta, ToolCallEnded]


@pytest.mark.parametrize(
    ("text", "said_text", "names"),
    [
        (CALL, "", ["get_weather"]),
        (f"\n\n{CALL}\n", "", ["get_weather"]),
        (f"Let me see.\n{CALL}", "Let me see.\n", ["get_weather"]),
        (f"{CALL}\n{CALL}", "", ["get_weather"] * 2),
        (f"{CALL}{CALL}\n\n{CALL}", "", ["get_weather"] * 3),
        (f"{CALL}\nDone.", "Done.", ["get_weather"]),
        (f"One. {CALL}\nTwo.\n{CALL}", "One. \nTwo.\n", ["get_weather"] * 2),
        (f"<think>{CALL}</think>{CALL}", "", ["get_weather"]),
        ('<tool_call>{"name":"ping","arguments":{}}</tool_call>', "", ["ping"]),
        ('<tool_call>  {"name":\t"ping",\n"arguments":   { }\n}  </tool_call>', "", ["ping"]),
    ],
)
def test_calls_are_told_apart_from_text(text: str, said_text: str, names: list[str]) -> None:
    events = read(text)
    assert text_of(events) == said_text
    assert [call.name for call in ended(events) if isinstance(call, ToolCall)] == names


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call",
        "<tool_call>x",
        "<tool_call>\n{'name': 'ping'}",
        '<tool_call>\n{"name": "", ',
        "a <tool_call><tool_call> b",
        '<tool_call>{"name": "' + "x" * 2000,
    ],
)
def test_what_turns_out_not_to_be_a_call_is_text(text: str) -> None:
    assert read(text) == [TextDelta(text)]


def test_without_tools_to_call_a_call_is_text() -> None:
    assert read(CALL, calls=False) == [TextDelta(CALL)]


@pytest.mark.parametrize("before", ["", "\n ", "<think>a</think>\n"])
def test_a_call_that_counts_only_at_the_start_is_one_there(before: str) -> None:
    call = '{"name": "ping", "parameters": {}}'
    events = read(before + call, format_with(LLAMA))
    assert list(map(said, ended(events))) == [("ping", {})]
    assert text_of(events) == ""
    assert text_of(read(f"Like this: {call}", format_with(LLAMA))) == f"Like this: {call}"


@pytest.mark.parametrize(
    ("text", "said_text", "calls"),
    [
        ('ping\n{"x": 1}', "", [("ping", {"x": 1})]),
        (' \nping\n{}>>>get_weather\n{"city": "Ulm"}', "", [("ping", {}), ("get_weather", {"city": "Ulm"})]),
        ("all\nHello", "Hello", []),
        ("all\nping\n{}", "ping\n{}", []),
        ("<think>hm</think>ping\n{}", "", [("ping", {})]),
        ("allow\n{}", "", [("allow", "{}")]),
        ("al", "al", []),
        ("pin", "", [("", "")]),
    ],
)
def test_where_nothing_marks_a_call_text_is_what_is_marked(
    text: str, said_text: str, calls: list[tuple[str, object]]
) -> None:
    events = read(text, format_with(UNMARKED, text=TextSyntax(open="all\n")))
    assert text_of(events) == said_text
    assert list(map(said, ended(events))) == calls


@pytest.mark.parametrize(
    ("text", "said_text", "calls"),
    [
        ("all\nHello>>>ping\n{}", "Hello", [("ping", {})]),
        ("Hello\n>>>ping\n{}", "Hello\n", [("ping", {})]),
        ('all\nA>>>ping\n{}>>>get_weather\n{"city": "Ulm"}', "A", [("ping", {}), ("get_weather", {"city": "Ulm"})]),
        ("all\n>>> ping\n{}", ">>> ping\n{}", []),
        ("all\n>>>print(1)\n1 >>>pin", ">>>print(1)\n1 >>>pin", []),
        ("all\n>>>rm\n{}", ">>>rm\n{}", []),
        ("all\nHello>>>ping", "Hello>>>ping", []),
        ("all\nHello>>>ping\n{", "Hello", [("ping", "{")]),
        ("all\nHello>>>>ping\n{}", "Hello>", [("ping", {})]),
    ],
)
def test_behind_a_text_the_name_of_a_tool_begins_a_call(
    text: str, said_text: str, calls: list[tuple[str, object]]
) -> None:
    if not text.startswith("all"):
        text = f"all\n{text}"
    format = format_with(BEHIND_TEXT, text=TextSyntax(open="all\n"))
    for pieces in ([text], list(text), [text[at : at + 3] for at in range(0, len(text), 3)]):
        events = run(parser(format), pieces)
        assert text_of(events) == said_text
        assert list(map(said, ended(events))) == calls


@pytest.mark.parametrize("name", SYNTAXES)
def test_every_syntax_is_read_back_as_it_is_written(name: str) -> None:
    first = {"city": 'Zürich "x" 5 < 6 & 7\nline \\ {', "days": -7, "note": None}
    second = {"to": "it's {ok}", "amount": 1.5, "sure": False, "tags": ["a]", "b}"], "more": {"x": [{}], "y": None}}
    calls = [
        ToolCall(id="one", name="get_weather", arguments=first),
        ToolCall(id="two", name="transfer", arguments=second),
        ToolCall(id="three", name="ping", arguments={}),
    ]
    some = calls if SYNTAXES[name].separator is not None else calls[:1]
    text = write_calls(SYNTAXES[name], some, TOOLS)
    assert text.startswith(SYNTAXES[name].trigger)
    events = read(text, format_with(SYNTAXES[name]))
    assert list(map(said, ended(events))) == list(map(said, some))
    assert text_of(events) == ""
    assert all(isinstance(call, ToolCall) for call in ended(events))


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_call_that_is_cut_off_is_never_one(name: str) -> None:
    """Wherever the reply ends: only calls that were read whole are calls, and a begun one is told as invalid."""
    syntax = SYNTAXES[name]
    call = ToolCall(id="a", name="transfer", arguments={"to": "Bob", "amount": 1000})
    whole = write_calls(syntax, [call], TOOLS)
    complete = whole.removesuffix(syntax.section_close.rstrip())
    for at in range(len(whole)):
        events = run(parser(format_with(syntax)), [whole[:at]])
        if at < len(syntax.trigger):
            assert text_of(events) == whole[:at]
            assert ended(events) == []
        elif at < len(complete.rstrip()):
            (told,) = ended(events)
            assert isinstance(told, InvalidToolCall), whole[:at]
            assert told.error == CUT
        else:
            assert list(map(said, ended(events))) == [said(call)]
            assert text_of(events) == ""


@pytest.mark.parametrize("name", [name for name, syntax in SYNTAXES.items() if syntax.separator is not None])
def test_a_second_call_that_is_cut_off_leaves_the_first(name: str) -> None:
    syntax = SYNTAXES[name]
    call = ToolCall(id="a", name="transfer", arguments={"to": "Bob"})
    start = len(write_calls(syntax, [call], TOOLS))
    whole = write_calls(syntax, [call, call], TOOLS).removesuffix(syntax.section_close)
    for at in range(start, len(whole)):
        first, *others = ended(run(parser(format_with(syntax)), [whole[:at]]))
        assert said(first) == said(call)
        assert all(isinstance(other, InvalidToolCall) for other in others), whole[:at]
    assert len(others) == 1


def test_of_a_key_that_stands_twice_the_last_one_counts_as_in_the_pieces() -> None:
    text = '<tool_call>{"name": "ping", "arguments": {"city": 1, "b": {"a": 1, "a": 2}, "city": 2}}</tool_call>'
    events = run(parser(WITH_HERMES), [text])
    (call,) = ended(events)
    (told,) = [event.arguments for event in events if isinstance(event, ToolCallDelta)]
    assert isinstance(call, ToolCall)
    assert call.arguments == json.loads(told) == {"city": 2, "b": {"a": 2}}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"days": NaN}', "NaN"),
        ('{"days": -Infinity}', "-Infinity"),
        ('{"days": 1e999}', "too large"),
        ('{"days": ' + "9" * 5000 + "}", "beyond what can be read"),
        ('{"city": "Ulm",}', "no JSON"),
        ('{"city" "Ulm"}', "no JSON"),
        ('{"city": "\\ud800"}', "surrogate"),
        ('["Ulm"]', "no JSON object"),
        ('"Ulm"', "no JSON object"),
        ("null", "no JSON object"),
        ("", "no JSON"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested deeper"),
        ('{"a": ' + "[" * 20_000 + "]" * 20_000 + "}", "beyond what can be read"),
    ],
)
def test_arguments_that_are_not_one_strict_object_make_an_invalid_call(arguments: str, error: str) -> None:
    text = f'<tool_call>{{"name": "ping", "arguments": {arguments}}}</tool_call>'
    events = run(parser(WITH_HERMES), [text])
    (call,) = ended(events)
    assert isinstance(call, InvalidToolCall)
    assert (call.name, call.arguments) == ("ping", arguments)
    assert error in call.error
    assert text_of(events) == ""


def test_a_tool_that_is_not_there_is_not_called() -> None:
    (call,) = ended(read(CALL.replace("get_weather", "rm")))
    assert isinstance(call, InvalidToolCall)
    assert said(call) == ("rm", '{"city": "Ulm"}')
    assert call.error == "there is no such tool; the tools are get_weather, transfer, ping"


def test_what_stands_in_the_place_of_a_calls_end_is_text() -> None:
    events = read(CALL.replace("}\n</tool_call>", "} or so.") + f"\n{CALL}")
    assert [type(call) for call in ended(events)] == [InvalidToolCall, ToolCall]
    assert text_of(events) == "} or so.\n"


@pytest.mark.parametrize("arguments", ['{"city": [}', '{"city": ]}', '{"city": "Ulm}', '{"city": "Ulm"'])
def test_unbalanced_arguments_make_no_call(arguments: str) -> None:
    text = f'<tool_call>{{"name": "ping", "arguments": {arguments}}}</tool_call>'
    assert not any(isinstance(call, ToolCall) for call in ended(read(text)))


def test_a_call_that_begins_in_the_place_of_anothers_end_is_read() -> None:
    """Also where both begin alike: what was taken for the end's beginning is looked at again."""
    events = read(CALL.replace("</tool_call>", "") + CALL)
    assert [type(call) for call in ended(events)] == [InvalidToolCall, ToolCall]
    events = read("<tool_call><tool_call>\n" + CALL)
    assert [type(call) for call in ended(events)] == [ToolCall]
    assert text_of(events) == "<tool_call><tool_call>\n"


def test_two_names_in_one_call_must_be_the_same() -> None:
    text = "<call><ping></transfer></call>"
    (call,) = ended(read(text, format_with(SYNTAXES["key-again"])))
    assert isinstance(call, InvalidToolCall)
    assert call.error == "the call has two names"


def test_the_models_own_ids_count_for_nothing() -> None:
    one = '{"name": "ping", "arguments": {}, "id": "000000000"}'
    events = read(f"[TOOL_CALLS][{one}, {one}]", format_with(MISTRAL))
    assert [call.id for call in ended(events)] == ["call_0", "call_1"]


@pytest.mark.parametrize("id_", ["a b", 'a", "x": "', "ä"])
def test_an_id_has_only_the_characters_of_ids(id_: str) -> None:
    text = f'[TOOL_CALLS][{{"name": "ping", "arguments": {{}}, "id": "{id_}"}}]'
    assert not isinstance(ended(read(text, format_with(MISTRAL)))[0], ToolCall)


def test_an_unmet_id_before_the_name_leaves_text() -> None:
    text = '<|START_ACTION|>[{"tool_call_id": "?", "tool_name": "ping", "parameters": {}}]<|END_ACTION|>'
    assert read(text, format_with(COHERE)) == [TextDelta(text)]


def test_text_after_a_section_is_text_and_a_new_section_is_read() -> None:
    section = write_calls(KIMI, [ToolCall(id="a", name="ping", arguments={})], TOOLS)
    events = read(f"{section}\n and {section}.", format_with(KIMI))
    assert text_of(events) == "and ."
    assert [call.id for call in ended(events)] == ["call_0", "call_1"]


# ---- arguments that are not JSON


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("Ulm", '"Ulm"'),
        ("", '""'),
        (" two\n\nlines\n", '" two\\n\\nlines\\n"'),
        ('"quoted" \\ <b>&amp;', '"\\"quoted\\" \\\\ <b>&amp;"'),
        ("</parameter>", '"</parameter>"'),
        ("null", '"null"'),
        ("5", '"5"'),
        ("</function>\n</tool_call>", '"</function>\\n</tool_call>"'),
    ],
)
def test_a_tagged_string_is_told_as_json(value: str, told: str) -> None:
    text = f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{value}\n</parameter>\n</function>\n</tool_call>"
    events = read(text, format_with(QWEN_CODER))
    assert ToolCallDelta(index=0, arguments=f'{{"city": {told}}}') in events
    assert list(map(said, ended(events))) == [("get_weather", {"city": value})]


@pytest.mark.parametrize(
    ("key", "value", "arguments"),
    [
        ("days", "3", {"days": 3}),
        ("days", " -3 ", {"days": -3}),
        ("days", "many", None),
        ("days", "", None),
        ("note", "null", {"note": None}),
        ("note", "nullify", {"note": "nullify"}),
        ("note", "nul", {"note": "nul"}),
        ("other", '"text"', {"other": "text"}),
        ("other", "[1, {}]", {"other": [1, {}]}),
        ("other", "text", None),
    ],
)
def test_the_schema_says_how_a_tagged_value_is_read(key: str, value: str, arguments: dict[str, object] | None) -> None:
    text = f"<tool_call>\n<function=get_weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"
    (call,) = ended(read(text, format_with(QWEN_CODER)))
    if arguments is None:
        assert isinstance(call, InvalidToolCall)
    else:
        assert said(call) == ("get_weather", arguments)


def test_a_tag_that_says_what_is_a_string_is_believed_for_unknown_keys() -> None:
    body = '<|"|>a, b<|"|>'
    (call,) = ended(read(f"<|tool_call>call:ping{{x:{body},y:[1]}}<tool_call|>", format_with(GEMMA)))
    assert said(call) == ("ping", {"x": "a, b", "y": [1]})


def test_a_type_that_is_written_is_read_over() -> None:
    text = '<|open|>call transfer\n<|key|>amount" type="number">2.5<|end|><|key|>to" type="string">Bo<|end|><|close|>'
    (call,) = ended(read(text, format_with(TYPED)))
    assert said(call) == ("transfer", {"amount": 2.5, "to": "Bo"})


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        (r"{\"city\": \"Z\u00fcrich \ud83d\ude00\"}", {"city": "Zürich 😀"}),
        (r"{\"city\": \"a\\\"b\\n\"}", {"city": 'a"b\n'}),
        (r"{\n\t\"days\": 3\n}", {"days": 3}),
        (r"{\u0022days\u0022:3}", {"days": 3}),
        ("{}", {}),
    ],
)
def test_arguments_in_a_json_string_are_unescaped_as_they_come(inside: str, arguments: dict[str, object]) -> None:
    text = f'<function_call>{{"name": "get_weather", "arguments": "{inside}"}}</function_call>'
    assert list(map(said, ended(read(text, format_with(TEXT_ARGUMENTS))))) == [("get_weather", arguments)]


@pytest.mark.parametrize("inside", [r"{\x}", r"{\u00zz}", r"{\"a\": 1", r"{}}", r"{\"a\": \"\ud83d\"}"])
def test_a_json_string_that_holds_no_object_makes_an_invalid_call(inside: str) -> None:
    text = f'<function_call>{{"name": "get_weather", "arguments": "{inside}"}}</function_call>'
    (call,) = ended(read(text, format_with(TEXT_ARGUMENTS)))
    assert isinstance(call, InvalidToolCall)
    assert ("an escape that JSON does not know" in call.error) == (inside in (r"{\x}", r"{\u00zz}"))


def test_a_flushed_parser_says_nothing_more() -> None:
    one = parser(WITH_HERMES)
    one.feed("<tool_call>")
    assert [type(event) for event in one.flush()] == [ToolCallStarted, ToolCallEnded]
    assert (one.feed("x"), one.flush()) == ([], [])
