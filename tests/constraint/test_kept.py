"""Compiled grammars are kept within bounds: of their number, and of what they were made of."""

from __future__ import annotations

import random

from llama_worker import ResponseFormat, ToolSpec
from llama_worker._constraint.compiler import ConstraintCompiler
from llama_worker._constraint.grammar import grammar_of
from llama_worker._constraint.kept import COMPILED, MOST_KEPT, MOST_WEIGHT, KeptGrammars, weight_of
from llama_worker._constraint.rules import Grammar, Plain
from tests.chat.formats import SYNTAXES, format_with
from tests.constraint.walks import PLAIN, VOCABULARY, request


def heavy(number: int, weight: int, field: str = "tools") -> Grammar:
    return Grammar(field=field, rules=(("start", Plain(f"{number:08}" + "x" * (weight // COMPILED - 8))),))


def test_those_that_weigh_too_much_together_go_longest_unused_first() -> None:
    kept = KeptGrammars[int]()
    third = MOST_WEIGHT // 3
    for number in range(3):
        kept.keep(heavy(number, third), number)
    assert kept.get(heavy(0, third)) == 0
    kept.keep(heavy(3, third), 3)
    assert [kept.get(heavy(number, third)) for number in range(4)] == [0, None, 2, 3]
    assert kept.weight == 3 * weight_of(heavy(0, third))


def test_one_that_is_too_heavy_by_itself_is_kept_alone() -> None:
    kept = KeptGrammars[int]()
    small, large = 20 * COMPILED, MOST_WEIGHT + COMPILED
    kept.keep(heavy(1, small), 1)
    kept.keep(heavy(2, large), 2)
    assert (len(kept), kept.get(heavy(2, large))) == (1, 2)
    kept.keep(heavy(3, small), 3)
    assert (len(kept), kept.weight) == (1, small)


def test_number_and_weight_stay_within_bounds_whatever_comes() -> None:
    kept, chance = KeptGrammars[int](), random.Random(1)
    for _ in range(2000):
        field = chance.choice(["tools", "response_format.regex"])
        made = heavy(chance.randrange(200), chance.choice([COMPILED * 20, MOST_WEIGHT // 20, MOST_WEIGHT // 2]), field)
        if chance.random() < 0.5:
            kept.keep(made, 0)
        else:
            kept.get(made)
        assert len(kept) <= MOST_KEPT
        assert kept.weight == sum(map(weight_of, kept)) <= MOST_WEIGHT


def test_all_that_a_caller_writes_has_weight() -> None:
    """Wherever it is written: nothing that may be large weighs nothing, and what is compiled weighs more."""
    size = 50_000
    properties = {"q": {"type": "string", "description": "d" * size}}
    listed = {"q": {"enum": [f"value {number}" for number in range(size // 10)]}}
    asked = [ResponseFormat(type="choice", choices=("a" * size, "b"))]
    asked += [ResponseFormat(type="regex", regex="a" * size), ResponseFormat(type="gbnf", grammar="#" * size)]
    grammars = [grammar_of(request(response_format=form), PLAIN, in_reasoning=False) for form in asked]
    for syntax in SYNTAXES.values():
        tool = ToolSpec(name="t", parameters={"type": "object", "properties": listed})
        grammars.append(grammar_of(request(tools=(tool,)), format_with(syntax), in_reasoning=False))
    for made in grammars:
        assert made is not None
        assert weight_of(made) >= size * COMPILED
    tool = ToolSpec(name="t", parameters={"type": "object", "properties": properties})
    made = grammar_of(request(tools=(tool,)), PLAIN, in_reasoning=False)
    assert made is not None
    assert size * COMPILED > weight_of(made) >= size


def test_large_schemas_push_each_other_out() -> None:
    compiler = ConstraintCompiler(VOCABULARY)
    size = MOST_WEIGHT // COMPILED // 4
    for number in range(6):
        listed = {"enum": [f"value {number} {index:06}" for index in range(size // 20)]}
        tool = ToolSpec(name="t", parameters={"type": "object", "properties": {"q": listed}})
        made = grammar_of(request(tools=(tool,)), PLAIN, in_reasoning=False)
        assert made is not None
        compiler.constraint(made)
    assert 3 <= len(compiler._kept) <= 4
