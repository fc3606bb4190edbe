"""The detokenizer yields whole characters only, and in all exactly what decoding at once yields."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._text.detokenizer import Detokenizer

BYTES = [bytes([value]) for value in range(256)]
# Bytes around which UTF-8 decoders differ: leads, continuations, surrogates, overlong forms, beyond U+10FFFF.
TRICKY = st.sampled_from(b"\x00aZ\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe4\xed\xef\xf0\xf1\xf4\xf5\xff")
SOUP = st.lists(TRICKY | st.integers(0, 255), max_size=40).map(bytes) | st.text().map(str.encode)


def decode(pieces: list[bytes], **options: bool) -> list[str]:
    detokenizer = Detokenizer(pieces, **options)
    return [*(detokenizer.feed(token) for token in range(len(pieces))), detokenizer.flush()]


@settings(deadline=None)
@given(data=SOUP, cuts=st.lists(st.integers(0, 40)))
def test_any_cutting_of_any_bytes_equals_decoding_at_once(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:stop] for start, stop in pairwise(edges)]
    assert "".join(decode(pieces)) == data.decode("utf-8", "replace")


@settings(deadline=None)
@given(text=st.text())
def test_each_character_appears_with_its_last_byte(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    for character in text:
        *before, last = character.encode()
        assert [detokenizer.feed(byte) for byte in before] == [""] * len(before)
        assert detokenizer.feed(last) == character
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("data", [b"\xff", b"\xc0", b"\x80", b"\xe0\x80", b"\xed\xa0\x80", b"\xf4\x90", b"\xc3a"])
def test_invalid_bytes_are_replaced_as_soon_as_they_are_known(data: bytes) -> None:
    detokenizer = Detokenizer(BYTES)
    seen = "".join(detokenizer.feed(byte) for byte in data)
    assert seen == data.decode("utf-8", "replace")
    assert "\ufffd" in seen


def test_an_incomplete_tail_becomes_one_replacement_at_the_end() -> None:
    assert decode([b"ab\xf0\x9f", b"\x98"]) == ["ab", "", "\ufffd"]


def test_a_second_flush_is_empty() -> None:
    detokenizer = Detokenizer([b"\xf0"])
    assert (detokenizer.feed(0), detokenizer.flush(), detokenizer.flush()) == ("", "\ufffd", "")


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b" Hi", b" you"], "Hi you"),
        ([b"", b" ", b" x"], " x"),
        ([b"Hi", b" you"], "Hi you"),
        ([b"  x"], " x"),
        ([], ""),
    ],
)
def test_one_leading_space_is_stripped_when_asked(pieces: list[bytes], text: str) -> None:
    assert "".join(decode(pieces, strip_leading_space=True)) == text


def test_an_id_beyond_the_vocabulary_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        Detokenizer(BYTES).feed(256)
