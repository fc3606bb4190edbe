"""Tools, calls, results and thoughts reach the template in OpenAI's form, or are written as text by visible rules."""

from __future__ import annotations

import json
from datetime import date, datetime
from typing import Any

import pytest

from llama_worker._chat.analysis import format_of
from llama_worker._chat.format import CallSyntax, ChatFormat, Slot
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._errors import InvalidRequestError, TemplateError
from llama_worker._requests import Message, ToolCall, ToolSpec

TODAY = date(2026, 11, 5)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = ToolSpec(name="get_weather", description="The weather of a city.", parameters=CITY)
NOTHING = ToolSpec(name="ping")
SHOWN = "{% for m in messages %}{{ m.content }}{% endfor %}"

NATIVE = """
{%- for tool in tools or [] %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{%- for m in messages %}
    {{- '<' ~ m.role ~ '>' ~ m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '[' ~ call.id ~ ' ' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) ~ ']' }}
    {%- endfor %}
    {%- if m.role == 'tool' %}{{ '(' ~ m.tool_call_id ~ ' ' ~ m.name ~ ')' }}{% endif %}
{%- endfor %}
"""


def user(text: str = "hi") -> Message:
    return Message(role="user", content=text)


def said(text: str, **more: Any) -> Message:
    return Message(role="assistant", content=text, **more)


def called(*calls: tuple[str, str, dict[str, Any]], text: str = "") -> Message:
    made = tuple(ToolCall(id=call_id, name=name, arguments=arguments) for call_id, name, arguments in calls)
    return said(text, tool_calls=made)


def result(text: str, call_id: str | None = None, name: str | None = None) -> Message:
    return Message(role="tool", content=text, tool_call_id=call_id, name=name)


def lay_out(source: str, *messages: Message, **given: Any) -> str:
    return ChatTemplate(source, bos_text="<s>", eos_text="</s>").lay_out(messages, today=TODAY, **given).text


def changes(source: str, *messages: Message, **given: Any) -> tuple[str, ...]:
    return ChatTemplate(source, bos_text="<s>", eos_text="</s>").lay_out(messages, today=TODAY, **given).changes


TALK = (
    Message(role="system", content="be brief"),
    user("rain?"),
    called(("c1", "get_weather", {"city": "Ulm"}), ("c2", "ping", {})),
    result("wet", "c1"),
    result("pong", "c2"),
    said("yes"),
    user("thanks"),
)
TOOLS = (WEATHER, NOTHING)


# -- what a template is given


def test_a_template_that_knows_tools_is_given_all_in_openai_s_form() -> None:
    tools = [
        {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": schema}}
        for tool, schema in ((WEATHER, CITY), (NOTHING, {"type": "object", "properties": {}}))
    ]
    assert lay_out(NATIVE, *TALK, tools=TOOLS) == (
        "".join(json.dumps(tool) + "\n" for tool in tools) + "<system>be brief<user>rain?"
        '<assistant>[c1 get_weather {"city": "Ulm"}][c2 ping {}]'
        "<tool>wet(c1 get_weather)<tool>pong(c2 ping)<assistant>yes<user>thanks"
    )
    assert changes(NATIVE, *TALK, tools=TOOLS) == ()


def test_the_content_of_a_turn_is_never_none() -> None:
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": TALK[2].tool_calls})
    source = NATIVE + "{% for m in messages %}{{ m.content is string }}{% endfor %}"
    assert lay_out(source, user(), message).endswith("TrueTrue")


def test_a_result_is_given_the_name_and_the_id_of_its_call() -> None:
    rendered = lay_out(NATIVE, user(), TALK[2], result("pong", "c2"), result("wet", "c1"))
    assert rendered.endswith("<tool>pong(c2 ping)<tool>wet(c1 get_weather)")


def test_a_result_without_an_id_answers_the_next_open_call() -> None:
    rendered = lay_out(NATIVE, user(), TALK[2], result("wet"), result("pong"))
    assert rendered.endswith("<tool>wet(c1 get_weather)<tool>pong(c2 ping)")


def test_a_name_that_the_result_brings_counts() -> None:
    assert lay_out(NATIVE, user(), TALK[2], result("wet", "c1", "other")).endswith("(c1 other)")


def test_calls_without_an_id_get_different_ones() -> None:
    talk = called(("", "ping", {"a": "b"}), ("", "ping", {"a": "c"}))
    assert "[call_1_0 ping" in lay_out(NATIVE, user(), talk)
    assert "[call_1_1 ping" in lay_out(NATIVE, user(), talk)


def test_thoughts_are_given_under_all_their_names() -> None:
    names = "{{ m.reasoning_content }}|{{ m.reasoning }}|{{ m.thinking }}|"
    source = SHOWN + "{% for m in messages if m.role == 'assistant' %}" + names + "{% endfor %}"
    assert lay_out(source, user(), said("yes", reasoning="hm")) == "hiyeshm|hm|hm|"


def test_thoughts_may_be_dropped() -> None:
    assert changes(SHOWN, user(), said("yes", reasoning="hm")) == ()


@pytest.mark.parametrize(("wanted", "text"), [(None, "unset"), (True, "True"), (False, "False")])
def test_thinking_is_on_off_or_not_spoken_of(wanted: bool | None, text: str) -> None:
    source = "{{ enable_thinking | default('unset') }} " + SHOWN
    assert lay_out(source, user(), enable_thinking=wanted) == f"{text} hi"


def test_thinking_is_switched_by_the_name_that_the_format_knows() -> None:
    format = ChatFormat(digest="", origin="derived", takes_tools=True, takes_calls=True, thinking_switch="thinking")
    source = "{{ thinking | default('unset') }} " + SHOWN
    assert lay_out(source, user(), enable_thinking=False, format=format) == "False hi"
    assert lay_out(source, user(), format=format) == "unset hi"


def test_tools_are_written_alike_each_time_and_in_their_order() -> None:
    assert lay_out(NATIVE, *TALK, tools=TOOLS) == lay_out(NATIVE, *TALK, tools=TOOLS)
    first, second = lay_out(NATIVE, user(), tools=TOOLS).split("\n")[:2]
    assert ("get_weather" in first, "ping" in second) == (True, True)


def test_what_a_template_does_to_calls_and_tools_is_not_seen_by_the_next_rendering() -> None:
    source = "{% set _ = tools[0].function.update(name='x') %}{% set _ = messages[1].tool_calls[0].pop('id') %}"
    template = ChatTemplate(
        "{{ tools[0].function.name }}{{ messages[1].tool_calls[0].id }}" + NATIVE + source, bos_text="", eos_text=""
    )
    rendered = {template.lay_out([user(), TALK[2]], tools=TOOLS, today=TODAY).text for _ in range(3)}
    assert len(rendered) == 1
    assert rendered.pop().startswith("get_weatherc1")


def test_a_tool_may_have_a_long_description() -> None:
    tool = ToolSpec(name="f", description="word " * 2000)
    assert tool.description in lay_out(NATIVE, user(), tools=[tool])
    assert tool.description in lay_out(CHATML, user(), tools=[tool])


@pytest.mark.parametrize("bad", [{"a": object()}, {"a": datetime(2026, 1, 1)}, {"a": b"x"}])
def test_arguments_and_schemas_that_are_no_plain_data_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        lay_out(NATIVE, user(), called(("c1", "f", bad)))
    with pytest.raises(InvalidRequestError, match="tools"):
        lay_out(NATIVE, user(), tools=[ToolSpec(name="f", parameters=bad)])


def test_data_that_holds_itself_or_unfolds_without_end_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    doubled: Any = "x"
    for _ in range(60):
        doubled = [doubled, doubled]
    for bad in (endless, {"a": doubled}):
        with pytest.raises(InvalidRequestError, match="tools"):
            lay_out(NATIVE, user(), tools=[ToolSpec(name="f", parameters=bad)])
        with pytest.raises(InvalidRequestError, match="documents"):
            lay_out(NATIVE, user(), documents=bad)
        with pytest.raises(InvalidRequestError, match="messages"):
            lay_out(NATIVE, user(), called(("c1", "f", bad)))


# -- what templates refuse or drop


def test_arguments_are_text_where_the_template_joins_them_to_text() -> None:
    source = NATIVE.replace("(call.function.arguments | tojson)", "call.function.arguments").replace(" ~ ", " + ")
    assert '[c1 get_weather {"city": "Ulm"}]' in lay_out(source, *TALK)
    assert changes(source, *TALK) == ("the arguments of calls are given as text",)


def test_ids_are_rewritten_where_the_template_wants_nine_letters() -> None:
    check = "{% if call.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    source = NATIVE.replace("{{- '[' ~", check + "{{- '[' ~")
    rendered = lay_out(source, *TALK)
    assert rendered == lay_out(source, *TALK)
    first, second = (part.partition(" ")[0] for part in rendered.split("[")[1:])
    assert first != second
    assert all(len(name) == 9 and name.isalnum() for name in (first, second))
    assert f"<tool>wet({first} get_weather)<tool>pong({second} ping)" in rendered
    nine = called(("abcdEF123", "ping", {"a": "b"}))
    assert "[abcdEF123 ping" in lay_out(source, user(), nine)


def test_parameters_are_filled_where_the_template_looks_for_more() -> None:
    look = "{% for tool in tools %}{% for p in tool.function.parameters.properties.values() %}{{ p.description.x }}"
    source = look + "{{ p.type | upper }}{% endfor %}{% endfor %}" + NATIVE
    optional = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    schema = {"type": "object", "properties": {"n": optional, "c": {"enum": ["a"]}, "o": {"$ref": "#/$defs/O"}}}
    assert lay_out(source, user(), tools=[ToolSpec(name="f", parameters=schema)]).startswith("INTEGERSTRINGOBJECT")


def test_one_of_several_types_is_named_where_the_template_knows_no_more() -> None:
    """Like Hermes', which asks for the type of each of them for ever."""
    macro = "{% macro kind(t) %}{{ t | upper if t is string else kind(t) }}{% endmacro %}"
    look = "{% for tool in tools %}{% for p in tool.function.parameters.properties.values() %}{{ kind(p.type) }}"
    several = {"n": {"type": ["null", "integer"]}, "s": {"type": ["string", "null"]}, "z": {"type": "null"}}
    tool = ToolSpec(name="f", parameters={"type": "object", "properties": several})
    source = macro + look + "{% endfor %}{% endfor %}" + NATIVE
    assert lay_out(source, user(), tools=[tool]).startswith("INTEGERSTRINGNULL")


def test_objects_say_what_else_they_may_have_where_the_template_asks() -> None:
    """Like Command-R+'s, which names the type of what is in an object."""
    look = "{% for tool in tools %}{% for p in tool.function.parameters.properties.values() %}{{ p.description.x }}"
    source = look + "{{ p.additionalProperties.type | default('any', true) }} {% endfor %}{% endfor %}" + NATIVE
    open_object = {"type": "object"}
    parameters = {
        "o": open_object,
        "m": {"type": "object", "additionalProperties": {"type": "integer"}},
        "r": {"$ref": "#/$defs/O"},
    }
    schema = {"type": "object", "properties": parameters, "$defs": {"O": open_object}}
    source = source.replace("p.additionalProperties.type", "('' + p.additionalProperties.type | string)")
    assert lay_out(source, user(), tools=[ToolSpec(name="f", parameters=schema)]).startswith("None integer None")


def test_deep_parameters_are_filled_once() -> None:
    schema: dict[str, Any] = {"enum": ["a"]}
    for _ in range(28):
        schema = {"type": "object", "properties": {"p": schema}}
    look = "{% for tool in tools %}{{ tool.function.parameters.properties.p.description.x }}{% endfor %}"
    assert lay_out(look + NATIVE, user(), tools=[ToolSpec(name="f", parameters=schema)])


def test_a_reference_is_looked_through_for_its_type() -> None:
    look = "{% for tool in tools %}{% for p in tool.function.parameters.properties.values() %}{{ p.type | upper }}"
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/E"}, "b": True},
        "$defs": {"E": {"enum": ["a"], "type": "string"}},
    }
    source = look + "{{ p.description.x }}{% endfor %}{% endfor %}" + NATIVE
    assert lay_out(source, user(), tools=[ToolSpec(name="f", parameters=schema)]).startswith("STRINGOBJECT")


def test_what_was_said_beside_a_call_is_not_dropped() -> None:
    source = NATIVE.replace("~ m.content", "~ (m.content if not m.tool_calls else '')")
    talk = called(("c1", "ping", {}), text="wait")
    assert "<assistant>wait<assistant>[c1 ping {}]" in lay_out(source, user(), talk)


def test_what_was_said_beside_calls_is_put_before_the_answer_where_nothing_else_alternates() -> None:
    drop = NATIVE.replace("~ m.content", "~ (m.content if not m.tool_calls else '')")
    check = "{% set ns = namespace(last='') %}{% for m in messages if m.role != 'tool' and not m.tool_calls %}"
    check += (
        "{% if m.role == ns.last %}{{ raise_exception('alternate') }}{% endif %}{% set ns.last = m.role %}{% endfor %}"
    )
    first, second = (called((i, "ping", {}), text=f"wait {i}") for i in "ab")
    talk = (user(), first, result("one", "a"), second, result("two", "b"), said("done"), user("ok"))
    assert lay_out(check + drop, *talk).endswith("<assistant>wait a\n\nwait b\n\ndone<user>ok")


@pytest.mark.parametrize("arguments", [{"a": "b"}, {}, {"a": 1}, {"a": {"b": ["c"]}}])
def test_a_second_call_is_not_dropped(arguments: dict[str, Any]) -> None:
    source = NATIVE.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    talk = (user(), called(("c1", "f", arguments), ("c2", "g", arguments)), result("one", "c1"), result("two", "c2"))
    text = json.dumps(arguments)
    expected = f"<assistant>[c1 f {text}]<tool>one(c1 f)<assistant>[c2 g {text}]<tool>two(c2 g)"
    assert lay_out(source, *talk).endswith(expected)


@pytest.mark.parametrize("arguments", [{"a": "b"}, {}])
def test_calls_that_a_template_knows_nothing_of_are_written_as_text(arguments: dict[str, Any]) -> None:
    rendered = lay_out(CHATML, user(), called(("c1", "ping", arguments), text="wait"), user())
    text = f'<tool_call>\n{{"name": "ping", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    assert f"<|im_start|>assistant\nwait\n{text}<|im_end|>" in rendered


def test_calls_are_written_as_the_format_writes_them() -> None:
    syntax = CallSyntax(call=("call:", Slot.NAME, " ", Slot.ARGUMENTS), separator=";", trigger="call:")
    format = ChatFormat(digest="", origin="data", calls=syntax, takes_tools=True)
    assert 'assistant\ncall:get_weather {"city": "Ulm"};call:ping {}<|im_end|>' in lay_out(CHATML, *TALK, format=format)


def test_tools_that_a_template_knows_nothing_of_are_described_in_the_system_message() -> None:
    for messages in ([user()], [Message(role="system", content="be brief"), user()]):
        system = lay_out(CHATML, *messages, tools=TOOLS).partition("<|im_end|>")[0]
        assert system.startswith("<|im_start|>system\n")
        assert json.dumps(CITY) in system
        assert system.endswith("be brief") == (len(messages) == 2)
    assert changes(CHATML, user(), tools=TOOLS) == ("the tools are described in the system message",)


def test_tools_are_not_taken_for_rendered_because_calls_name_them() -> None:
    source = NATIVE.replace("in tools or []", "in []")
    assert json.dumps(CITY) in lay_out(source, *TALK, tools=TOOLS)
    assert changes(source, *TALK, tools=TOOLS) == ("the tools are described in the system message",)


@pytest.mark.parametrize("name", ["f", "c", "add", 'a"b', "größe", "名", "a b"])
def test_tools_of_any_name_are_seen_to_be_rendered_or_not(name: str) -> None:
    tool = ToolSpec(name=name, parameters=CITY)
    assert changes(NATIVE, user(), tools=[tool]) == ()
    assert changes(NATIVE.replace("tool | tojson", "tool | tojson(ensure_ascii=true)"), user(), tools=[tool]) == ()
    assert json.dumps(CITY) in lay_out(CHATML, user(), tools=[tool])


def test_results_become_user_messages_where_there_is_no_role_for_them() -> None:
    check = "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    rendered = lay_out(CHATML.replace("{{", check.replace("m.", "message.") + "{{", 1), user(), TALK[2], *TALK[3:5])
    assert "user\n<tool_response>\nwet\n</tool_response><|im_end|>" in rendered
    assert "user\n<tool_response>\npong\n</tool_response><|im_end|>" in rendered


STRICT = """
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<' ~ message.role ~ '>' ~ message.content }}
{%- endfor %}
"""


def test_a_template_that_knows_only_two_roles_gets_everything() -> None:
    template = ChatTemplate(STRICT, bos_text="", eos_text="")
    rendered = template.lay_out(TALK, tools=TOOLS, format=format_of(template), today=TODAY).text
    for part in (json.dumps(CITY), "be brief", "rain?", '"Ulm"', '"name": "ping"', "wet", "pong", "yes", "thanks"):
        assert part in rendered
    assert [piece.partition(">")[0] for piece in rendered.split("<") if piece.startswith(("user", "assistant"))] == [
        "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip


def test_a_trailing_system_message_follows_as_a_user_s() -> None:
    first_only = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}"
    source = first_only + "{% endif %}{{ '<' ~ m.role ~ '>' ~ m.content }}{% endfor %}"
    talk = (Message(role="system", content="be brief"), user(), said("yes"), Message(role="system", content="stop now"))
    assert lay_out(source, *talk) == "<system>be brief<user>hi<assistant>yes<user>stop now"


def test_only_the_last_system_message_is_no_way_to_lose_the_first() -> None:
    source = (
        "{% set ns = namespace(s='') %}{% for m in messages if m.role == 'system' %}{% set ns.s = m.content %}"
        "{% endfor %}{{ ns.s }}{% for m in messages if m.role != 'system' %}{{ '<' ~ m.role ~ '>' ~ m.content }}"
        "{% endfor %}"
    )
    both = (Message(role="system", content="be"), Message(role="system", content="brief"), user())
    assert lay_out(source, *both) == "be\n\nbrief<user>hi"


def test_the_smallest_change_is_made() -> None:
    assert changes(STRICT, user(), user()) == ("consecutive messages of one role are merged",)
    format = format_of(ChatTemplate(STRICT, bos_text="", eos_text=""))
    assert len(changes(STRICT, *TALK, tools=TOOLS, format=format)) == 5


def test_a_template_that_refuses_everything_says_why_and_no_content() -> None:
    talk = (user("swordfish"), called(("c1", "f", {"a": "swordfish"}), text="swordfish"), result("swordfish", "c1"))
    tool = ToolSpec(name="f", description="swordfish is secret")
    for part in ("messages | tojson", "tools | tojson", "messages[1].tool_calls[0].function.arguments.a"):
        with pytest.raises(TemplateError, match="never") as caught:
            lay_out("{{ raise_exception('never ' ~ (" + part + ")) }}", *talk, tools=[tool])
        assert "swordfish" not in str(caught.value)


# -- trying a template out


def test_trying_out_changes_nothing_about_the_turns() -> None:
    template = ChatTemplate(STRICT, bos_text="", eos_text="")
    turns = [{"role": "user", "content": "a"}]
    assert template.try_out(turns) == "<user>a"
    changing = ChatTemplate("{% set _ = messages[0].update(role='x') %}", bos_text="", eos_text="")
    assert changing.try_out(turns) == ""
    assert turns == [{"role": "user", "content": "a"}]
    with pytest.raises(TemplateError, match="System role not supported"):
        template.try_out([{"role": "system", "content": "a"}])


def test_trying_out_passes_on_what_it_is_given() -> None:
    template = ChatTemplate(
        "{{ add_generation_prompt }}{{ enable_thinking }}{{ tools | length }}", bos_text="", eos_text=""
    )
    assert (
        template.try_out([], tools=[{"type": "function"}], add_generation_prompt=True, enable_thinking=False)
        == "TrueFalse1"
    )
    with pytest.raises(TemplateError, match="it does more than"):
        ChatTemplate(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", bos_text="", eos_text=""
        ).try_out([])
