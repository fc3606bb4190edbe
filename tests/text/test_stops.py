"""Stop strings are found wherever the chunks are cut, and nothing of them leaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._text.stops import StopMatcher

# Two letters make overlaps and near misses the rule.
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)
CHUNKS = st.lists(st.text("abc", max_size=4), max_size=12)


def naive(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    found = min(((text.find(stop), len(stop), stop) for stop in stops if stop in text), default=None)
    return (text, None) if found is None else (text[: found[0]], found[2])


def run(chunks: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.feed(chunk) for chunk in chunks)
    return text + matcher.flush(), matcher.matched


@settings(deadline=None, max_examples=400)
@given(chunks=CHUNKS, stops=STOPS)
def test_any_chunking_gives_what_searching_the_whole_text_gives(chunks: list[str], stops: tuple[str, ...]) -> None:
    assert run(chunks, stops) == naive("".join(chunks), stops)


@settings(deadline=None, max_examples=400)
@given(chunks=CHUNKS, stops=STOPS)
def test_at_every_moment_all_is_emitted_that_no_continuation_can_take_back(
    chunks: list[str], stops: tuple[str, ...]
) -> None:
    matcher = StopMatcher(stops)
    fed = emitted = ""
    for chunk in chunks:
        fed += chunk
        emitted += matcher.feed(chunk)
        assert naive(fed, stops)[0].startswith(emitted), "something of a stop string leaked"
        if not matcher.stopped:
            held = fed[len(emitted) :]
            assert not held or any(len(stop) > len(held) and stop.startswith(held) for stop in stops)


@settings(deadline=None, max_examples=400)
@given(chunks=CHUNKS, stops=STOPS, more=st.text("abc"))
def test_a_decided_stop_is_final(chunks: list[str], stops: tuple[str, ...], more: str) -> None:
    matcher = StopMatcher(stops)
    text = "".join(matcher.feed(chunk) for chunk in chunks)
    if matcher.stopped:
        assert (matcher.feed(more), matcher.flush()) == ("", "")
        assert naive("".join(chunks) + more, stops) == (text, matcher.matched)


@pytest.mark.parametrize(
    ("chunks", "stops", "text", "matched"),
    [
        (["one\n\nUs", "er: two"], ("\n\nUser:",), "one", "\n\nUser:"),
        (["one\n\nUs", "eful"], ("\n\nUser:",), "one\n\nUseful", None),
        (["x<|im", "_e", "nd|>y"], ("<|im_end|>",), "x", "<|im_end|>"),
        (["ab", "cd"], ("abcd", "bc"), "", "abcd"),
        (["ab", "cx"], ("abcd", "bc"), "a", "bc"),
        (["abc"], ("abcd", "bc"), "a", "bc"),
        (["aab"], ("ab", "a"), "", "a"),
        (["STOP now"], ("STOP",), "", "STOP"),
        (["no stops at all"], (), "no stops at all", None),
        (["ééé", "ñ"], ("éñ",), "éé", "éñ"),
    ],
)
def test_cases_whole_and_character_by_character(
    chunks: list[str], stops: tuple[str, ...], text: str, matched: str | None
) -> None:
    whole = "".join(chunks)
    for cutting in (chunks, [whole], list(whole)):
        assert run(cutting, stops) == (text, matched)


def test_a_long_repetitive_stop_string_holds_no_more_than_itself() -> None:
    stop = "a" * 4000 + "b"
    matcher = StopMatcher((stop,))
    emitted = "".join(matcher.feed("a") for _ in range(5000))
    assert len(emitted) == 1000
    assert (matcher.feed("b"), matcher.matched) == ("", stop)
