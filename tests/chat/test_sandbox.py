"""A template from a stranger ends, whatever it does: in bounded time, in bounded memory, with a typed error."""

from __future__ import annotations

import tracemalloc
from datetime import date
from typing import Any

import pytest

from llama_worker._chat import fuel
from llama_worker._chat.sandbox import MAX_SOURCE
from llama_worker._chat.template import ChatTemplate
from llama_worker._errors import TemplateError
from llama_worker._requests import Message, ToolCall, ToolSpec

TODAY = date(2026, 11, 5)
SHOWN = "{{ messages[0].content }}"


def render(source: str, content: str = "hi") -> str:
    template = ChatTemplate(source, bos_text="<s>", eos_text="</s>")
    return template.render([Message(role="user", content=content)], today=TODAY)


def loop(body: str, rounds: int = 99999) -> str:
    return f"{{% for i in range({rounds}) %}}{body}{{% endfor %}}"


def nested(value: str, start: str = "[1]", rounds: int = 60) -> str:
    """`s` and `t`: `value` of itself, again and again. Two lists that are equal, but not the same."""
    return (
        f"{{% set ns = namespace(s={start}, t={start}) %}}{{% for i in range({rounds}) %}}"
        f"{{% set ns.s = {value.replace('x', 'ns.s')} %}}{{% set ns.t = {value.replace('x', 'ns.t')} %}}{{% endfor %}}"
    )


DOUBLED = nested("[x, x]")
TUPLES = nested("(x, x)", "(1, 2)")
DEEP_TUPLE = nested("(x,)", "(1,)", 20_000)
BIG = "{% set big = 'a' * 90000 %}"

ENDLESS = {
    "loop in loop": loop(loop(loop(""))),
    "loop with a test": loop("{% for j in range(99999) if false %}{% endfor %}"),
    "list that grows while it is read": "{% set l = [1] %}{% for i in l %}{% set _ = l.append(i) %}{% endfor %}",
    "list that is extended by itself": "{% set l = [1] %}" + loop("{% set _ = l.extend(l | map('string')) %}"),
    "macro that calls itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "caller that calls itself": (
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        "{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}"
    ),
    "loop that calls itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "loop that calls itself twice": (
        "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}"
    ),
    "loop that calls itself with much": (
        "{% for x in [1] recursive %}{% if loop.depth < 60 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}"
    ),
    "block that shows itself twice": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "long body": loop("{% set a = 1 %}" * 5000),
    "search in a text": BIG + loop("{% if 'ab' in big %}{% endif %}"),
    "count in a text": BIG + loop("{% set x = big.count('ab') %}"),
    "backward search": BIG + loop("{% set x = big.rfind('b' + big[:40000]) %}"),
    "trim by many characters": BIG + loop("{% set x = big.strip('b' * 9000 + 'a') %}"),
    "equal texts": BIG + "{% set same = 'a' * 90000 %}" + loop("{% set x = big == same %}"),
    "search in a list": "{% set l = range(99999) | list %}" + loop("{% set x = i - 99999 in l %}"),
    "test of a list": "{% set l = range(99999) | list %}" + loop("{% set x = -1 is in l %}"),
    "test of a text": BIG + loop("{% set x = big is lower %}"),
    "filter of a list": loop("{% set x = range(99999) | map('string') | list %}"),
    "greatest of a list": "{% set l = range(99999) | list %}" + loop("{% set x = l | max %}"),
    "attempt to refuel": "{% set x = [-1000000000] | map('a round') | list %}",
    "attempt to refuel by a test": "{% set x = [1] | map('a test', -1000000000) | list %}",
    "list of lists, written": DOUBLED + "{{ ns.s }}",
    "list of lists, as JSON": DOUBLED + "{{ ns.s | tojson }}",
    "list of lists, as JSON by map": DOUBLED + "{{ [ns.s] | map('tojson') | list }}",
    "list of lists, joined": DOUBLED + "{{ '' ~ ns.s }}",
    "list of lists, formatted": DOUBLED + "{{ '{}'.format(ns.s) }}",
    "list of lists, by printf": DOUBLED + "{{ '%s' % [ns.s] }}",
    "list of lists, by the filter": DOUBLED + "{{ '%s' | format(ns.s) }}",
    "list of lists, printed": DOUBLED + "{{ ns.s | pprint }}",
    "list of lists, trimmed": DOUBLED + "{{ ns.s | trim }}",
    "list of lists, raised": DOUBLED + "{{ raise_exception(ns.s) }}",
    "list of lists, in a mapping": DOUBLED + "{{ {'a': ns.s}.items() }}",
    "namespace, written": DOUBLED + "{{ ns }}",
    "list of lists, compared": DOUBLED + "{{ ns.s == ns.t }}",
    "list of lists, tested": DOUBLED + "{{ ns.s is eq(ns.t) }}",
    "list of lists, found": DOUBLED + "{{ ns.s in [ns.t] }}",
    "list of lists, selected": DOUBLED + "{{ [ns.s] | select('equalto', ns.t) | list }}",
    "list of lists, counted": DOUBLED + "{{ [ns.s].count(ns.t) }}",
    "list of lists, sorted": DOUBLED + "{{ [ns.s, ns.t] | sort }}",
    "list of lists, changed": DOUBLED + "{% for x in [ns.s, ns.t] %}{{ loop.changed(x) }}{% endfor %}",
    "tuple of tuples, a key": TUPLES + "{{ {ns.s: 1} }}",
    "tuple of tuples, looked up": TUPLES + "{{ {}[ns.s] }}",
    "tuple of tuples, got": TUPLES + "{{ {}.get(ns.s) }}",
    "tuple of tuples, found": TUPLES + "{{ ns.s in {} }}",
    "tuple of tuples, once": TUPLES + "{{ [ns.s] | unique | list }}",
    "deep tuple, a key": DEEP_TUPLE + "{{ {ns.s: 1} }}",
    "deep tuple, looked up": DEEP_TUPLE + "{{ {}[ns.s] }}",
    "deep tuple, in a mapping": DEEP_TUPLE + "{{ dict([(ns.s, 1)]) }}",
    "list that holds itself": "{% set l = [] %}{% set _ = l.append(l) %}{{ l }}",
}

HUGE = {
    "width": "{{ '%9999999999d' % 1 }}",
    "padding": "{{ 'x'.rjust(10**10) }}",
    "range": "{{ range(10**12) }}",
    "sum of texts": "{% set ns = namespace(s='ab') %}" + loop("{% set ns.s = ns.s + ns.s %}", 60),
    "join of texts": "{% set ns = namespace(s='ab') %}" + loop("{% set ns.s = ns.s ~ ns.s %}", 60),
    "block of texts": "{% set ns = namespace(s='ab') %}"
    + loop("{% set s %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = s %}", 60),
    "sum of lists": "{% set ns = namespace(s=[1]) %}" + loop("{% set ns.s = ns.s + ns.s %}", 60),
    "list that is extended by itself": "{% set l = [1] %}" + loop("{% set _ = l.extend(l) %}", 60),
    "macro that returns much": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% else %}{{ 'a' * 1000 }}{% endif %}{% endmacro %}"
        "{{ f(60) }}"
    ),
    "separators": "{{ range(90000) | join('x' * 90000) }}",
    "separators by the method": "{{ ('x' * 90000).join('a' * 90000) }}",
    "separators between what is made": "{{ ('x' * 90000).join(range(90000) | map('string')) }}",
    "replacements": "{{ ('a' * 90000) | replace('a', 'b' * 90000) }}",
    "replacements by the method": "{{ ('a' * 90000).replace('', 'b' * 90000) }}",
    "translation": "{{ ('a' * 90000).translate({97: 'b' * 90000}) }}",
    "tabs": "{{ ('\\t' * 90000).expandtabs(9999) }}",
    "fields": "{{ ('{0}' * 33000).format('a' * 90000) }}",
    "named fields": "{{ ('{a}' * 33000).format_map({'a': 'a' * 90000}) }}",
    "printf fields": "{{ ('%(a)s' * 20000) % {'a': 'a' * 90000} }}",
    "indented JSON": "{{ range(9999) | list | tojson(indent=9999999999) }}",
    "JSON indented by a text": "{{ range(9999) | list | tojson(indent='x' * 90000) }}",
    "JSON separators": "{{ range(9999) | list | tojson(separators=('x' * 90000, ':')) }}",
    "indentation": "{{ ('\\n' * 90000) | indent(9999) }}",
    "indentation by a text": "{{ ('\\nx' * 45000) | indent('y' * 90000) }}",
    "wrapping": "{{ ('ab ' * 30000) | wordwrap(1, wrapstring='x' * 90000) }}",
    "precision": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "number by its base": "{{ ('f' * 90000) | int(base=16) }}",
    "number by products": "{% set ns = namespace(n=10) %}" + loop("{% set ns.n = ns.n * ns.n %}", 99),
    "list of texts": "{% set l = [] %}" + loop("{% set _ = l.append('a' * 90000) %}"),
    "list of slices": BIG + "{% set l = [] %}" + loop("{% set _ = l.append(big[1:]) %}"),
    "list of lists": "{% set l = [] %}" + loop("{% set _ = l.append([" + "0," * 3000 + "]) %}"),
    "list of blocks": "{% set l = [] %}" + loop("{% set x %}" + "z" * 9000 + "{% endset %}{% set _ = l.append(x) %}"),
    "list of filtered texts": BIG + "{% set l = [] %}" + loop("{% set _ = l.append(big | upper) %}"),
    "list of pieces": "{% set s = 'a,' * 45000 %}{% set l = [] %}" + loop("{% set _ = l.append(s.split(',')) %}"),
    "list of letters": "{% set s = 'é→' * 45000 %}{% set l = [] %}" + loop("{% set _ = l.append(s | list) %}"),
    "list of mappings": "{% set l = [] %}" + loop("{% set _ = l.append({}.fromkeys(range(99999))) %}"),
    "constants": "{{ 'x' | center(10000) }}" * 10_000,
    "output": loop("{{ 'abcdefgh' * 1000 }}"),
    "source": "x" * (MAX_SOURCE + 1),
}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less fuel, so that it is used up in milliseconds."""
    monkeypatch.setattr(fuel, "STEPS", 100_000)
    monkeypatch.setattr(fuel, "ROOM", 2**20)
    monkeypatch.setattr(fuel, "STEPS_PER_CHARACTER", 0)
    monkeypatch.setattr(fuel, "ROOM_PER_CHARACTER", 0)


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.usefixtures("little")
def test_what_would_never_end_is_a_template_error(name: str) -> None:
    with pytest.raises(TemplateError, match=r"it does|it makes|it holds|nests|recursion|writes a|without fuel"):
        render(ENDLESS[name] + SHOWN)


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.usefixtures("little")
def test_what_would_fill_the_memory_is_a_template_error(name: str) -> None:
    with pytest.raises(
        TemplateError, match=r"it (does|makes|holds|renders)|width|Range|multiplies|a number|a method|chara"
    ):
        render(HUGE[name] + SHOWN)


@pytest.mark.parametrize("name", ["loop in loop", "macro that calls itself twice", "list of lists, compared"])
def test_the_real_limits_end_it_too(name: str) -> None:
    with pytest.raises(TemplateError, match=r"it does more than"):
        render(ENDLESS[name] + SHOWN)


@pytest.mark.parametrize("name", ["sum of texts", "list of texts", "list of letters", "list of lists"])
def test_memory_stays_bounded(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            render(HUGE[name] + SHOWN)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 512 * 2**20


def test_what_is_used_up_is_not_tried_in_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    class Counted(fuel.Fuel):
        def __init__(self, given: int) -> None:
            runs.append(given)
            super().__init__(given)

    template = ChatTemplate(ENDLESS["loop in loop"] + SHOWN, bos_text="", eos_text="")
    monkeypatch.setattr(fuel, "Fuel", Counted)
    with pytest.raises(TemplateError, match=r"it does more than"):
        template.render([Message(role="user", content="hi")], today=TODAY)
    assert len(runs) == 1


AGENT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "name": "f", "arguments": {"x": "y"}}]},
    {"role": "tool", "content": "3", "tool_call_id": "a"},
    {"role": "system", "content": "be briefer"},
    {"role": "user", "content": "and?"},
]
REFUSING = {
    "steps": "{% for i in range(3000) %}{% endfor %}",
    "room": "{% set x = 'ab' * 20000 %}",
    "output": "x" * 90_000,
}


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.usefixtures("little")
def test_a_template_that_refuses_whatever_is_tried_ends_within_one_tank_more(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: the first rendering and its probe have a tank each, all changes together one."""
    tanks: list[fuel.Fuel] = []

    class Counted(fuel.Fuel):
        def __init__(self, given: int) -> None:
            tanks.append(self)
            super().__init__(given)

    refusal = "{{ raise_exception('no ' ~ messages | map(attribute='role') | join) }}"
    template = ChatTemplate(REFUSING[name] + refusal, bos_text="", eos_text="")
    monkeypatch.setattr(fuel, "Fuel", Counted)
    messages = [Message.model_validate(turn) for turn in AGENT]
    with pytest.raises(TemplateError, match=r"no systemuserassistant.*; while a change .* it (does|makes)"):
        template.lay_out(messages, tools=[ToolSpec(name="f")], today=TODAY)
    assert len(tanks) == 3
    assert all(tank.steps >= 0 and tank.room >= 0 for tank in tanks[:2])


class Counting(ChatTemplate):
    renderings = 0

    def _run(self, *args: Any) -> str:
        self.renderings += 1
        return super()._run(*args)


def test_large_data_is_tried_less_often() -> None:
    """Each try copies it. Counted: what costs no fuel is bounded, too."""

    def renderings(argument: Any) -> int:
        refusing = "{{ raise_exception('no ' ~ messages | map(attribute='role') | join) }}"
        template = Counting(refusing, bos_text="", eos_text="")
        call = ToolCall(id="a", name="f", arguments={"x": argument})
        messages = [Message.model_validate(turn) for turn in AGENT]
        messages[2] = messages[2].model_copy(update={"tool_calls": (call,)})
        with pytest.raises(TemplateError, match="no system"):
            template.lay_out(messages, tools=[ToolSpec(name="f")], today=TODAY)
        return template.renderings

    assert renderings(list(range(50_000))) <= 2 * 40 < renderings("y")


def test_a_change_that_helps_has_fuel_of_its_own() -> None:
    """The first rendering may use nearly a whole tank, and one that follows it, too."""
    choosy = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + SHOWN
    template = ChatTemplate(loop("", 99_999) * 4 + choosy, bos_text="", eos_text="")
    messages = [Message(role="system", content="be brief"), Message(role="user", content="hi")]
    assert "be brief" in template.render(messages, today=TODAY)


def test_each_rendering_has_its_own_fuel() -> None:
    template = ChatTemplate(loop("", 50_000) + SHOWN, bos_text="", eos_text="")
    for _ in range(30):
        assert template.render([Message(role="user", content="hi")], today=TODAY) == "hi"


def test_what_is_given_may_be_long() -> None:
    """A megabyte of text, looked through and copied as templates do."""
    content = "word " * 200_000
    looked = "{% set c = messages[0].content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    copied = "{{ (c.strip().lstrip('\\n') + '\\n') | trim | replace('\\r', '') }}{{ c | tojson | length }}"
    assert render(looked + copied, content).startswith("word word")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for a in [1, 2, 3] if a != 2 %}{{ a }}{% else %}none{% endfor %}", "13"),
        ("{% for a in [] %}{{ a }}{% else %}none{% endfor %}", "none"),
        ("{% for a, b in {'x': 1}.items() %}{{ a ~ b ~ loop.last }}{% endfor %}", "x1True"),
        ("{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }};{% endfor %}", "1;2;;;3;"),
        ("{% macro f(a, b='y') %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call f('x') %}z{% endcall %}", "xyz"),
        ("{% block a %}{{ messages[0].content }}{% endblock %}", "hi"),
        ("{{ 'a' in 'cat' }}{{ 'b' not in 'cat' }}{{ 1 in [1, 2] }}{{ 'k' in {'k': 1} }}{{ 1 < 2 < 3 }}", "True" * 5),
        ("{{ messages[0] == messages[-1] }}{{ messages[0] in messages }}{{ (1, 2) in [(1, 2)] }}", "True" * 3),
        ("{{ {('a', 1): 'b'}[('a', 1)] }}", "b"),
        ("{{ 'abcdef'[1:3] }}{{ [1, 2, 3][::-1] }}{{ messages[1:] }}", "bc[3, 2, 1][]"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{% set x %}a{{ 'b' }}{% endset %}{{ x ~ 1 ~ none ~ undefined_name }}", "ab1None"),
        (
            "{{ [3, 1, 2] | sort | join('-') }}{{ ['b', 'a'] | unique | list }}{{ 'a,b'.split(',') }}",
            "1-2-3['b', 'a']['a', 'b']",
        ),
        ("{{ 'x'.join(['a', 'b']) }}{{ 'a b'.replace(' ', '_') }}{{ '-'.join('ab' | list) }}", "axba_ba-b"),
        ("{{ [1, 2] + [3] }}{{ (1,) + (2,) }}{{ 1 + 1.5 }}", "[1, 2, 3](1, 2)2.5"),
        ("{{ none }}{{ true }}{{ 1.0 }}{{ {'a': [1, (2,)]} }}{{ range(3) }}", "NoneTrue1.0{'a': [1, (2,)]}range(0, 3)"),
        ("{{ dict(a=1) }}{{ dict([('a', 1)]) }}", "{'a': 1}{'a': 1}"),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner() %}{{ j() }}{{ j() }}", "ab, "),
    ],
)
def test_honest_templates_notice_nothing(source: str, text: str) -> None:
    assert render(source + "{{ '|' ~ messages[0].content }}") == text + "|hi"


@pytest.mark.parametrize("source", ["{{ 'x' | random }}", "{{ lipsum() }}", "{{ '<a>' | striptags }}"])
def test_what_is_no_function_of_its_input_is_not_there(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source + SHOWN)
