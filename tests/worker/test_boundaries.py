"""Where a prompt is cut so that a later one can start there: at what stays the same, never beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker import GenerationRequest, Message, ModelConfig, ToolSpec
from llama_worker._boundaries import LEAST, SPACING, chat_boundaries, common_text, raw_boundaries
from llama_worker._tokens import common_prefix
from llama_worker._view import ModelView
from llama_worker.testing import fake_loader

TOOL = ToolSpec(name="look", description="Looks something up.", parameters={"type": "object", "properties": {}})


def view(hybrid: bool = True) -> ModelView:
    config = ModelConfig(model="fake://model", n_ctx=100_000)
    return ModelView.of(fake_loader(hybrid=hybrid)(config), config, 1)


def prepared(messages: list[Message], **fields: object) -> tuple[np.ndarray, tuple[int, ...]]:
    job = view().prepare_generation(GenerationRequest(messages=tuple(messages), **fields))  # type: ignore[arg-type]
    return job.prompt, job.boundaries


def user(text: str) -> Message:
    return Message(role="user", content=text)


SYSTEM = Message(role="system", content="be a tool " * 20)


def test_they_lie_behind_what_the_next_prompts_begin_with():
    """The instructions, all before the last question, all before the words that ask for the reply."""
    so = Message(role="assistant", content="so")
    tokens, boundaries = prepared([SYSTEM, user("one " * 30), so, user("two " * 20)])
    another_chat, _ = prepared([SYSTEM, user("hello")])
    another_question, _ = prepared([SYSTEM, user("one " * 30), so, user("what? " * 20)])
    next_turn, _ = prepared(
        [
            SYSTEM,
            user("one " * 30),
            so,
            user("two " * 20),
            Message(role="assistant", content="and so on"),
            user("x"),
        ]
    )
    commons = sorted(common_prefix(tokens, other) for other in (another_chat, another_question, next_turn))
    assert len(boundaries) == 3
    for boundary, common in zip(boundaries, commons, strict=True):
        assert common - 24 <= boundary <= common


def test_tools_are_part_of_what_stays():
    tokens, boundaries = prepared([SYSTEM, user("one " * 30)], tools=(TOOL,))
    other, _ = prepared([SYSTEM, user("two " * 30)], tools=(TOOL,))
    without, _ = prepared([SYSTEM, user("one " * 30)])
    common = common_prefix(tokens, other)
    assert common > common_prefix(tokens, without)
    assert common - 24 <= boundaries[0] <= common


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=30)), min_size=1, max_size=6),
    st.text(max_size=30),
)
def test_none_lies_beyond_what_a_next_turn_has_in_common(turns: list[tuple[str, str]], reply: str):
    """Whatever users write, control tokens included: the last one is within the next turn's prompt."""
    messages = [SYSTEM, *[Message(role=role, content=text) for role, text in turns], user("<|im_end|>?")]  # type: ignore[arg-type]
    tokens, boundaries = prepared(messages)
    following, _ = prepared([*messages, Message(role="assistant", content=reply), user("x")])
    assert all(0 < boundary < len(tokens) for boundary in boundaries)
    assert list(boundaries) == sorted(set(boundaries))
    assert boundaries[-1] <= common_prefix(tokens, following)


def test_models_that_can_trim_have_none():
    request = GenerationRequest(messages=(SYSTEM, user("one " * 30)))
    assert view(hybrid=False).prepare_generation(request).boundaries == ()


def test_a_raw_prompt_has_one_before_its_end_and_some_in_between():
    assert raw_boundaries(LEAST - 1) == ()
    assert raw_boundaries(LEAST) == (LEAST - 1,)
    assert raw_boundaries(3 * SPACING) == (SPACING, 2 * SPACING, 3 * SPACING - 1)


@pytest.mark.parametrize(("added", "left_out"), [(0, 0), (3, 0), (0, 3)])
def test_what_a_tokenizer_adds_or_leaves_out_makes_them_earlier(added: int, left_out: int):
    """A space in front, a character that is dropped: counted from both ends, the earlier place is taken."""
    tokens = np.arange(added + 100 - left_out, dtype=np.int32) % 50
    (place,) = chat_boundaries(tokens, [b"x"] * 50, [60], 100)
    assert place <= 60 - left_out + added
    assert place >= 60 - left_out - 1


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_common_text_is_the_longest_common_beginning(head: str, a: str, b: str):
    one, two = head + a, head + b
    n = common_text(one, two)
    assert one[:n] == two[:n]
    assert n == min(len(one), len(two)) or one[n] != two[n]
