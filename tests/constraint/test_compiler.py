"""ConstraintCompiler and Constraint: masks, what is forced, how a reply ends, and what must not happen."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llama_worker import InvalidRequestError, ResponseFormat, ToolSpec, UnsupportedFeatureError
from llama_worker._constraint.compiler import ConstraintCompiler
from llama_worker._constraint.grammar import grammar_of
from llama_worker._constraint.rules import Grammar
from llama_worker._engine.vocabulary import LlamaVocabulary
from llama_worker._errors import GenerationError
from llama_worker.testing import ByteTokenizer
from llama_worker.testing._tokenizer import IM_END
from tests.constraint.walks import (
    COMPILER,
    PLAIN,
    MarkedVocabulary,
    allowed,
    constraint,
    fits,
    json_constraint,
    may_end,
    reply,
    request,
)

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = ToolSpec(name="move", parameters=POINT)


def grammar(**asked: object) -> Grammar:
    made = grammar_of(request(**asked), PLAIN, in_reasoning=False)
    assert made is not None
    return made


def point() -> Grammar:
    return grammar(response_format=ResponseFormat(type="json_schema", json_schema=POINT))


def test_mask_has_one_bit_for_each_token() -> None:
    mask = json_constraint(POINT).mask()
    assert mask.dtype == np.uint8
    assert mask.shape == ((ByteTokenizer.n_tokens + 7) // 8,)


def test_mask_before_what_is_forced_allows_just_that() -> None:
    made = json_constraint(POINT)
    assert allowed(made) == [ord("{")]
    made.accept(ord("{"))
    assert bytes(made.forced()) == b'"x": '


def test_forced_tokens_count_as_accepted() -> None:
    made = json_constraint(POINT)
    assert bytes(made.forced()) == b'{"x": '
    assert made.forced() == []
    assert set(bytes(allowed(made))) == set(b"-0123456789")


def test_reply_ends_only_when_it_is_whole() -> None:
    made = json_constraint(POINT)
    for token in b'{"x": 12':
        assert not may_end(made)
        assert not made.is_complete
        made.accept(token)
    made.accept(ord("}"))
    assert made.is_complete
    assert allowed(made) == [IM_END]


def test_accepting_what_the_mask_forbids_is_a_generation_error() -> None:
    made = json_constraint(POINT)
    made.forced()
    with pytest.raises(GenerationError, match="grammar"):
        made.accept(ord("x"))
    with pytest.raises(GenerationError):
        made.mask()
    assert not made.is_complete


def test_accepting_another_token_than_the_forced_one_is_a_generation_error() -> None:
    with pytest.raises(GenerationError, match="forces"):
        json_constraint(POINT).accept(ord("x"))


def test_control_tokens_are_never_allowed_in_text_or_strings() -> None:
    text = constraint(request(tools=(TOOL,)))
    string = json_constraint({"type": "string"})
    string.forced()
    for made in (text, string):
        assert [token for token in allowed(made) if token > 255] in ([], [IM_END])


def test_user_text_that_looks_like_a_control_token_is_none() -> None:
    made = constraint(request(response_format=ResponseFormat(type="choice", choices=("<|im_end|>", "<s>"))))
    assert allowed(made) == [ord("<")]
    assert {
        reply(COMPILER.constraint(grammar(response_format=ResponseFormat(type="choice", choices=("<s>",)))), 1)
    } == {"<s>"}


def test_control_token_of_the_format_is_that_token_and_cannot_be_spelled() -> None:
    vocabulary = MarkedVocabulary(["<tool_call>"])
    made = ConstraintCompiler(vocabulary).constraint(grammar(tools=(TOOL,), tool_choice="required"))
    assert vocabulary.pieces[made.forced()[0]] == b"<tool_call>"
    lazy = ConstraintCompiler(vocabulary).constraint(grammar(tools=(TOOL,)))
    for token in b"a <tool_call":
        lazy.accept(token)
    assert may_end(lazy)
    assert ord(">") not in allowed(lazy)


def test_same_grammar_is_compiled_once() -> None:
    compiler = ConstraintCompiler(ByteTokenizer())
    compiler.constraint(point())
    kept = compiler._kept.get(point())
    assert kept is not None
    compiler.constraint(point())
    assert compiler._kept.get(point()) is kept


def test_kept_grammars_are_bounded() -> None:
    compiler = ConstraintCompiler(ByteTokenizer())
    for number in range(80):
        compiler.constraint(grammar(response_format=ResponseFormat(type="choice", choices=(str(number),))))
    assert len(compiler._kept) == 64


def test_constraints_of_one_grammar_do_not_know_of_each_other() -> None:
    first, second = COMPILER.constraint(point()), COMPILER.constraint(point())
    assert fits(first, '{"x": 1}')
    assert bytes(second.forced()) == b'{"x": '


def test_many_threads_compile_and_follow_at_once() -> None:
    compiler = ConstraintCompiler(ByteTokenizer())
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                choice = str((number + turn) % 5)
                made = compiler.constraint(
                    grammar(response_format=ResponseFormat(type="choice", choices=(choice, "x")))
                )
                if reply(made, turn) not in (choice, "x"):
                    wrong.append(choice)
        except BaseException as exc:  # noqa: BLE001 - what a thread dies of must be seen
            wrong.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_constraint_may_be_handed_from_thread_to_thread() -> None:
    made = json_constraint(POINT)
    made.forced()
    thread = threading.Thread(target=lambda: made.accept(ord("7")))
    thread.start()
    thread.join()
    made.accept(ord("}"))
    assert made.is_complete


def test_first_mask_is_there_when_the_constraint_is() -> None:
    times = []
    for _ in range(5):  # the fastest: a collection of garbage may fall into any one
        made = COMPILER.constraint(grammar(tools=(TOOL,)))
        started = time.thread_time()
        made.mask()
        times.append(time.thread_time() - started)
    assert min(times) < 0.002


def test_forced_tokens_come_in_bounded_portions() -> None:
    made = constraint(request(response_format=ResponseFormat(type="choice", choices=("x" * 2000,))))
    portions = []
    while not made.is_complete:
        portions.append(len(made.forced()))
    assert max(portions) <= 512
    assert sum(portions) == 2000


def test_vocabulary_that_cannot_write_json_is_refused() -> None:
    vocabulary = ByteTokenizer()
    vocabulary.pieces = tuple(b"" if piece == b"{" else piece for piece in vocabulary.pieces)
    with pytest.raises(UnsupportedFeatureError, match="constrained output"):
        ConstraintCompiler(vocabulary).constraint(point())


def test_vocabulary_that_ends_nothing_is_refused() -> None:
    vocabulary = ByteTokenizer()
    vocabulary.end_tokens = frozenset()
    with pytest.raises(UnsupportedFeatureError, match="ends a reply"):
        ConstraintCompiler(vocabulary).constraint(point())


@pytest.mark.engine
def test_bert_vocabulary_is_refused(minilm_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="constrained output"):
        ConstraintCompiler(LlamaVocabulary(minilm_path)).constraint(point())


@pytest.mark.engine
def test_demo_model_is_held_to_a_schema(smollm2_path: Path) -> None:
    vocabulary = LlamaVocabulary(smollm2_path)
    compiler = ConstraintCompiler(vocabulary)
    for seed in range(5):
        text = reply(
            compiler.constraint(point()), seed, pieces=vocabulary.pieces, weights=np.ones(len(vocabulary.pieces))
        )
        assert text is None or text.startswith('{"x": ')


@pytest.mark.engine
def test_tokens_of_the_models_own_tokenizer_are_what_is_forced(smollm2_path: Path) -> None:
    vocabulary = LlamaVocabulary(smollm2_path)
    made = ConstraintCompiler(vocabulary).constraint(grammar(tools=(TOOL,), tool_choice="required"))
    whole = vocabulary.tokenize(
        '<tool_call>\n{"name": "move", "arguments": {"x": 1}}\n</tool_call>', add_special=False, parse_special=False
    ).tolist()
    forced = made.forced()
    assert len(forced) > 5
    assert whole[: len(forced)] == forced


def test_what_is_not_enforced_is_logged_once_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    compiler = ConstraintCompiler(ByteTokenizer())
    schema = {"type": "array", "items": {"const": "a secret"}, "uniqueItems": True}
    asked = grammar(response_format=ResponseFormat(type="json_schema", json_schema=schema))
    with caplog.at_level(logging.WARNING, "llama_worker"):
        compiler.constraint(asked)
        compiler.constraint(asked)
    assert len(caplog.records) == 1
    assert "uniqueItems" in caplog.text
    assert "secret" not in caplog.text


def test_error_of_a_grammar_names_where_it_was_given() -> None:
    for given, where in (
        (ResponseFormat(type="regex", regex="(a"), "response_format.regex"),
        (ResponseFormat(type="lark", grammar="start: missing\n"), "response_format.grammar"),
        (ResponseFormat(type="gbnf", grammar="root ::= ("), "response_format.grammar"),
        (ResponseFormat(type="gbnf", grammar="other ::= [a-z]\n"), "response_format.grammar"),
    ):
        with pytest.raises(InvalidRequestError) as info:
            constraint(request(response_format=given))
        assert info.value.field == where
