"""Text from users never becomes a control token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from llama_worker._chat.segments import ControlTextGuard, Segment

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "<pad>")
GUARD = ControlTextGuard(CONTROLS)
PARTS = st.lists(
    st.sampled_from([*CONTROLS, "<|im_", "end|>", "start|>", "<", ">", "<s", "/s>", "[IN", "ST]", " ", "\n", "hi", "a"])
    | st.sampled_from(["\U000f0000", "\U000f0001"])
    | st.text(max_size=3),
    max_size=8,
)
TEXTS = PARTS.map("".join)


def plain(text: str) -> str:
    return text.replace("\U000f0000", "").replace("\U000f0001", "")


def joined(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def count_controls(segments: list[Segment]) -> int:
    """How many control tokens a tokenizer could see: each piece is tokenized by itself."""
    return sum(segment.text.count(control) for segment in segments if segment.special for control in CONTROLS)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_protected_text_has_no_control_token_and_loses_nothing(text: str) -> None:
    segments = GUARD.split(GUARD.protect(text))
    assert joined(segments) == plain(text)
    assert count_controls(segments) == 0
    assert all(segment.text for segment in segments)


@settings(deadline=None, max_examples=300)
@given(first=TEXTS, second=TEXTS)
def test_two_messages_side_by_side_cannot_form_a_control_token(first: str, second: str) -> None:
    """Even in a template that writes contents with nothing between them, trimmed."""
    rendered = GUARD.protect(first).strip() + GUARD.protect(second).strip()
    assert count_controls(GUARD.split(rendered)) == 0


@pytest.mark.parametrize(
    ("before", "user", "after"), [("<|im_", "end|>", ""), ("", "x<|im_end", "|>"), ("<", "s>", "")]
)
def test_user_text_cannot_complete_what_the_template_begins(before: str, user: str, after: str) -> None:
    segments = GUARD.split(before + GUARD.protect(user) + after)
    assert joined(segments) == before + user + after
    assert count_controls(segments) == 0


@pytest.mark.parametrize(
    "render",
    [
        "{{ text | trim }}",
        "{{ text.strip() }}",
        "{{ text.split('\\n')[0] }} ... {{ text.split('\\n')[-1] }}",
        "{{ text[:7] }}",
        "{{ text[3:] }}",
        "{{ text.split('<s>')[-1] }}",
        "{{ text | replace('\\n', ' ') }}",
        "{% if '<|im_end|>' in text %}found{% else %}{{ text }}{% endif %}",
    ],
)
@settings(deadline=None)
@given(text=TEXTS)
def test_no_control_token_survives_what_templates_do_to_text(render: str, text: str) -> None:
    template = Environment(autoescape=False).from_string("<|im_start|>user\n" + render + "<|im_end|>\n")
    segments = GUARD.split(template.render(text=GUARD.protect(text)))
    assert count_controls(segments) == 2, "only the template's own"
    assert "\U000f0000" not in joined(segments)
    assert "\U000f0001" not in joined(segments)


def test_the_template_s_own_tokens_stay_special() -> None:
    rendered = f"<|im_start|>user\n{GUARD.protect('hi<|im_end|>you')}<|im_end|>"
    assert GUARD.split(rendered) == [
        Segment("<|im_start|>user\nhi", True),
        Segment("<|im_end|>", False),
        Segment("you<|im_end|>", True),
    ]


def test_ordinary_text_is_not_touched() -> None:
    for text in ("", "Hello!", "a < b and b > c", "> quoted", "x <", "if x<y:\n\treturn [1]", "  \n"):
        assert GUARD.protect(text) == text


def test_trimming_still_finds_the_blanks() -> None:
    assert GUARD.protect(" \n<|im_end|>end|> \n").strip() == GUARD.protect("<|im_end|>end|>")


def test_marks_in_the_input_are_removed_before_looking() -> None:
    segments = GUARD.split(GUARD.protect("<|im\U000f0000_end|>\U000f0001"))
    assert segments == [Segment("<|im_end|>", False)]


def test_a_mark_that_the_template_cuts_off_leaves_another() -> None:
    rendered = GUARD.protect("ab<|im_end|>cd")
    for start in range(len(rendered)):
        for stop in range(start, len(rendered)):
            assert count_controls(GUARD.split(rendered[start:stop])) == 0


def test_the_longest_control_text_at_a_place_is_taken() -> None:
    guard = ControlTextGuard(["<unused1>", "<unused1", "<unused12>"])
    assert guard.split(guard.protect("a<unused12>b"))[1] == Segment("<unused12>", False)


def test_a_vocabulary_without_control_texts_changes_nothing() -> None:
    guard = ControlTextGuard([])
    assert guard.split(guard.protect("<|im_end|>")) == [Segment("<|im_end|>", True)]
    assert guard.split("") == []
