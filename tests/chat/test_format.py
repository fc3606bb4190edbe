"""What is read off a template: calls of every shape, thoughts, what it takes."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from llama_worker._chat.analysis import analyse, format_of
from llama_worker._chat.calls import write_calls
from llama_worker._chat.format import ChatFormat, ReasoningSyntax, Slot, Tagged, TextSyntax
from llama_worker._chat.template import CHATML, ChatTemplate
from llama_worker._requests import Message, ToolCall, ToolSpec

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [ToolSpec(name=name, description="a tool", parameters=PARAMETERS) for name in ("get_weather", "find_hotel")]
CALLS = [
    ToolCall(id="call00001", name="get_weather", arguments={"city": "Zürich 5 < 6 {x}", "days": -7}),
    ToolCall(id="call00002", name="find_hotel", arguments={"city": "a\nb", "days": 0}),
]

SYSTEM = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}"


def written(text: str) -> str:
    """`text` in a template, where a line break behind a block would be trimmed."""
    return f"{{{{ {json.dumps(text)} }}}}"


def chat_template(calls: str) -> ChatTemplate:
    return ChatTemplate(SYSTEM + TURNS + calls + END, bos_text="", eos_text="")


def per_call(body: str, *, between: str = "\n") -> ChatTemplate:
    """A template that writes `body` for each call c, whose arguments are a."""
    inner = "{% set f = c.function %}{% set a = f.arguments %}" + body
    return chat_template(f"{EACH}{inner}{{% if not loop.last %}}{written(between)}{{% endif %}}{{% endfor %}}")


def rendered_calls(template: ChatTemplate, calls: list[ToolCall]) -> str:
    chat = [Message(role="user", content="hi"), Message(role="assistant", content="", tool_calls=tuple(calls))]
    text = template.lay_out(chat, tools=TOOLS, add_generation_prompt=False, today=date(2026, 1, 1)).text
    return text.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n").strip()


def syntax(format: ChatFormat) -> Any:
    assert format.calls is not None
    return format.calls


JSON_SHAPES = {
    "name first": '<tool_call>{"name": {{ f.name | tojson }}, "arguments": {{ a | tojson }}}</tool_call>',
    "arguments first": '<tool_call>{"arguments": {{ a | tojson }}, "name": "{{ f.name }}"}</tool_call>',
    "nested": '<call>{"type": "function", "function": {"name": "{{ f.name }}", "parameters": {{ a | tojson }}}}</call>',
    "id inside": '<call>{"id": "{{ c.id }}", "f": {"arguments": {{ a | tojson }}, "name": "{{ f.name }}"}}</call>',
    "id last": '<call>{"name": "{{ f.name }}", "arguments": {{ a | tojson }}, "id": "{{ c.id }}"}</call>',
    "keyed by the name": '<call>{"{{ f.name }}": {{ a | tojson }}}</call>',
    "numbered": '<call>{"n": "{{ loop.index0 }}", "name": "{{ f.name }}", "arguments": {{ a | tojson }}}</call>',
    "name in a tag": "<function={{ f.name }}>{{ a | tojson }}</function>",
    "no end": "[TOOL_CALLS]{{ f.name }}[ARGS]{{ a | tojson }}",
    "name twice": ' to={{ f.name }}<|m|><call name="{{ f.name }}">{{ a | tojson }}</call>',
    "arguments as text": '<call>{"name": "{{ f.name }}", "arguments": {{ a | tojson | tojson }}}</call>',
    "in quotes": '<call>{"name": "{{ f.name }}", "arguments": {{ a | tojson }}, "end": "yes"}</call>',
}


@pytest.mark.parametrize("shape", JSON_SHAPES)
@pytest.mark.parametrize("between", ["\n", "", ", ", "<|sep|>"])
def test_calls_with_json_are_read_whatever_their_shape(shape: str, between: str) -> None:
    template = per_call(JSON_SHAPES[shape], between=between)
    found = format_of(template)
    assert (found.origin, found.takes_tools, found.takes_calls) == ("derived", True, True)
    for n in (1, 2):
        assert write_calls(syntax(found), CALLS[:n], TOOLS) == rendered_calls(template, CALLS[:n])


@pytest.mark.parametrize("number", ["index", "index0"])
def test_running_numbers_are_slots(number: str) -> None:
    found = syntax(format_of(per_call(f"<call>{{{{ f.name }}}}:{{{{ loop.{number} }}}} {{{{ a | tojson }}}}</call>")))
    assert found.call == ("<call>", Slot.NAME, ":", Slot.INDEX, " ", Slot.ARGUMENTS, "</call>")


ARRAYS = {
    "tag": ("<calls>[", ", ", "]</calls>"),
    "bare": ("[", ", ", "]"),
    "lines": ("<calls>\n", "\n", "\n</calls>"),
    "fence": ("Action:\n```json\n[", ",\n", "\n]```"),
}


@pytest.mark.parametrize("around", ARRAYS)
def test_what_stands_around_all_calls_is_the_section(around: str) -> None:
    opening, between, closing = ARRAYS[around]
    body = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    several = f"{{% if not loop.last %}}{written(between)}{{% endif %}}"
    section = f"{written(opening)}{EACH}{body}{several}{{% endfor %}}{written(closing)}"
    template = chat_template(f"{{% if m.tool_calls %}}{section}{{% endif %}}")
    found = syntax(format_of(template))
    assert (found.section_open, found.separator, found.section_close) == (opening, between, closing)
    assert found.only_at_start == (around == "bare")
    for n in (1, 2):
        assert write_calls(found, CALLS[:n], TOOLS) == rendered_calls(template, CALLS[:n])


VALUE = "{{ v if v is string else v | tojson }}"
TAGGED_SHAPES = {
    "lines": "<p={{ k }}>\n" + VALUE + "\n</p>\n",
    "pairs": "<k>{{ k }}</k><v>" + VALUE + "</v>",
    "typed": '<p name="{{ k }}" string="{{ "true" if v is string else "false" }}">' + VALUE + "</p>",
    "type named": '<p name="{{ k }}" type="{{ "string" if v is string else "number" }}">' + VALUE + "</p>",
    "key again": "<{{ k }}>" + VALUE + "</{{ k }}>",
}


@pytest.mark.parametrize("shape", TAGGED_SHAPES)
@pytest.mark.parametrize("between", ["", "\n"])
def test_arguments_that_are_written_one_by_one_are_read(shape: str, between: str) -> None:
    argument = TAGGED_SHAPES[shape] + f"{{% if not loop.last %}}{written(between)}{{% endif %}}"
    each = f"{{% for k, v in a.items() %}}{argument}{{% endfor %}}"
    template = per_call(f"<call>{{{{ f.name }}}}|{each}</call>")
    found = syntax(format_of(template))
    assert isinstance(found.arguments, Tagged)
    assert found.arguments.between == between
    for calls in (CALLS, CALLS[1:], [CALLS[0].model_copy(update={"arguments": {}})]):
        assert write_calls(found, calls, TOOLS) == rendered_calls(template, calls)


def test_a_template_that_renders_one_call_only_has_no_separator() -> None:
    only = per_call(
        "{% if loop.length > 1 %}{{ raise_exception('one call') }}{% endif %}"
        '{"name": "{{ f.name }}", "parameters": {{ a | tojson }}}'
    )
    found = syntax(format_of(only))
    assert found.separator is None
    assert (found.trigger, found.only_at_start) == ('{"name": "', True)


@pytest.mark.parametrize(
    ("body", "trigger"),
    [
        ('<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ a | tojson }}}\n</tool_call>', "<tool_call>"),
        ("<function={{ f.name }}>{{ a | tojson }}</function>", "<function="),
        ("[TOOL_CALLS]{{ f.name }}[ARGS]{{ a | tojson }}", "[TOOL_CALLS]"),
        ('functools[{"name": "{{ f.name }}", "arguments": {{ a | tojson }}}]', "functools["),
        ("<|im_end|>call<|sep|>{{ f.name }}{{ a | tojson }}", "<|im_end|>call<|sep|>"),
    ],
)
def test_the_trigger_is_the_shortest_beginning_that_is_meant(body: str, trigger: str) -> None:
    found = syntax(format_of(per_call(body)))
    assert (found.trigger, found.only_at_start) == (trigger, False)


def test_what_ends_only_a_turn_of_calls_is_no_part_of_them() -> None:
    call = "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    section = f"<calls>{EACH}{call}{{% endfor %}}</calls><|end_of_calls|>"
    found = syntax(format_of(chat_template(f"{{% if m.tool_calls %}}{section}{{% endif %}}")))
    assert (found.section_open, found.section_close) == ("<calls>", "</calls>")


def test_arguments_are_given_as_text_where_a_mapping_does_not_work() -> None:
    concatenated = per_call('<call>{"name": "{{ f.name }}", "arguments": {{ "" + a }}}</call>')
    assert format_of(concatenated).arguments_as_text
    in_pythons_way = per_call('<call>{"name": "{{ f.name }}", "arguments": {{ a }}}</call>')
    assert format_of(in_pythons_way).arguments_as_text
    assert syntax(format_of(in_pythons_way)).arguments == "json"


@pytest.mark.parametrize(
    ("value", "in_pythons_way"),
    [("v", True), ("v | string", True), ("v | tojson", False), ("v if v is string else v | tojson", False)],
)
def test_values_are_given_as_text_where_they_come_out_in_pythons_way(value: str, in_pythons_way: bool) -> None:
    body = (
        f"<call>{{{{ f.name }}}}{{% for k, v in a.items() %}}<p={{{{ k }}}}>{{{{ {value} }}}}</p>{{% endfor %}}</call>"
    )
    template = per_call(body)
    assert format_of(template).values_as_text is in_pythons_way
    told = {"yes": True, "nothing": None, "nested": {"a": [False, "x"]}, "n": 3, "days": 1}
    call = ToolCall(id="call00001", name="get_weather", arguments=told)
    chat = [Message(role="user", content="hi"), Message(role="assistant", content="", tool_calls=(call,))]
    said = template.lay_out(chat, tools=TOOLS, format=format_of(template), today=date(2026, 1, 1)).text
    for written in ("true", "null", '{"a": [false, "x"]}', "3"):
        assert f">{written}</p>" in said


ELEMENTS = """
{%- macro all(v) %}
    {%- if v is mapping %}{% for k, w in v.items() %}<{{ k }}>{{ all(w) }}</{{ k }}>{% endfor %}
    {%- elif v is string %}{{ v }}
    {%- elif v is iterable %}{% for w in v %}<item>{{ all(w) }}</item>{% endfor %}
    {%- else %}{{ v | tojson }}{% endif %}
{%- endmacro %}<call>{{ f.name }}{% for k, v in a.items() %}<p={{ k }}>{{ all(v) }}</p>{% endfor %}</call>"""
QUOTED = """
{%- macro all(v) %}
    {%- if v is mapping %}{{ '{' }}{% for k, w in v.items() %}{{ k }}:{{ all(w) }},{% endfor %}{{ '}' }}
    {%- elif v is string %}<|"|>{{ v }}<|"|>
    {%- elif v is iterable %}[{% for w in v %}{{ all(w) }},{% endfor %}]
    {%- else %}{{ v }}{% endif %}
{%- endmacro %}<call>{{ f.name }}{{ '{' }}
{%- if a is mapping %}{% for k, v in a.items() %}{{ k }}:{{ all(v) }}{% if not loop.last %},{% endif %}{% endfor %}
{%- else %}{{ a }}{% endif %}{{ '}' }}</call>"""


@pytest.mark.parametrize(("body", "given"), [(ELEMENTS, "values_as_text"), (QUOTED, "arguments_as_written")])
def test_past_calls_are_written_as_the_model_is_held_to_write_them(body: str, given: str) -> None:
    """Where a template writes nested values in a way of its own."""
    template = per_call(body)
    found = format_of(template)
    assert getattr(found, given)
    tool = ToolSpec(name="f", parameters={"type": "object", "properties": {"t": {"type": "string"}, "n": {}, "o": {}}})
    call = ToolCall(id="call00001", name="f", arguments={"t": "a<b", "n": None, "o": {"x": ["y", True, {}]}})
    chat = [Message(role="user", content="hi"), Message(role="assistant", content="", tool_calls=(call,))]
    said = template.lay_out(chat, tools=[tool], format=found, today=date(2026, 1, 1)).text
    assert write_calls(syntax(found), [call], [tool]) in said


# ---- thoughts


THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"


def thinking_template(before: str = THOUGHT, prompt: str = "") -> ChatTemplate:
    body = (
        '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    )
    turns = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + before + "{{ m.content }}" + EACH + body + "{% endfor %}"
    )
    end = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" + prompt + "{% endif %}"
    return ChatTemplate(SYSTEM + turns + end, bos_text="", eos_text="")


@pytest.mark.parametrize("prompt", ["", "<think>\n", "<think>\n\n</think>\n\n"])
def test_thoughts_are_read_wherever_the_prompt_ends(prompt: str) -> None:
    found = format_of(thinking_template(prompt=prompt))
    assert found.reasoning == ReasoningSyntax(open="<think>", close="</think>")
    assert found.replays_reasoning
    assert syntax(found).call[0] == '<tool_call>\n{"name": "'
    assert found.turn_open == "<|im_start|>assistant\n"


def test_an_empty_thought_before_a_call_belongs_to_the_prompt() -> None:
    always = "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    found = format_of(thinking_template(always))
    assert syntax(found).section_open + str(syntax(found).call[0]) == '<tool_call>\n{"name": "'
    assert found.text == TextSyntax()


def test_an_empty_thought_that_stands_before_calls_only_is_no_part_of_them() -> None:
    before_calls = THOUGHT + "{% if m.tool_calls and not m.reasoning_content %}<think></think>{% endif %}"
    found = syntax(format_of(thinking_template(before_calls)))
    assert found.section_open + str(found.call[0]) == '<tool_call>\n{"name": "'


def test_thoughts_that_are_not_replayed_are_read_off_the_source() -> None:
    cut = "{% set content = (m.content or '').split('</think>')[-1] %}{# <think> #}"
    found = format_of(thinking_template(cut))
    assert found.reasoning == ReasoningSyntax(open="<think>", close="</think>")
    assert not found.replays_reasoning


def test_the_switch_is_a_variable_that_changes_the_prompt() -> None:
    switched = "{% if enable_thinking %}<think>\n{% endif %}"
    assert format_of(thinking_template(prompt=switched)).thinking_switch == "enable_thinking"
    assert format_of(thinking_template(prompt="{{ '' if enable_thinking else '' }}")).thinking_switch is None


def test_marked_text_is_told_from_calls() -> None:
    turns = (
        "{% for m in messages %}<|start|>{{ m.role }}"
        "{% if m.tool_calls %}<|act|>"
        "[{% for c in m.tool_calls %}{% set f = c.function %}"
        '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]<|end_act|>"
        "{% else %}<|text|>{{ m.content }}<|end_text|>{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    found = format_of(ChatTemplate(SYSTEM + turns, bos_text="", eos_text=""))
    assert found.text == TextSyntax(open="<|text|>", close="<|end_text|>")
    assert (syntax(found).section_open, syntax(found).section_close) == ("<|act|>[", "]<|end_act|>")


# ---- whatever the template


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "",
        "no variables",
        "{{ messages }}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
        "{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "qxfun qxk1 qxcontent qxthought",
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}",
    ],
)
def test_any_template_has_a_format_with_calls(source: str) -> None:
    found = format_of(ChatTemplate(source, bos_text="", eos_text=""))
    assert Slot.NAME in syntax(found).call
    assert Slot.ARGUMENTS in syntax(found).call


def test_a_template_without_calls_gets_the_generic_form() -> None:
    found = format_of(ChatTemplate(CHATML, bos_text="", eos_text=""))
    assert (found.origin, found.takes_tools, found.takes_calls) == ("generic", False, False)


def test_a_format_is_made_once_for_a_template() -> None:
    source = SYSTEM + TURNS + END
    first, second = (ChatTemplate(source, bos_text="", eos_text="") for _ in range(2))
    assert format_of(first) is format_of(second)
    assert analyse(first) == format_of(first)
