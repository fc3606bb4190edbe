"""What in a rendered prompt came from whom: control tokens that users wrote.

Text from users must never become control tokens. Before rendering, `ControlTextGuard.protect` wraps what
could be read as one between two private-use characters; templates trim, split and search as before, because
all else is untouched. After rendering, `ControlTextGuard.split` takes the marks out again, and what stood
between them is tokenized as plain text, in a piece of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

_OPEN, _CLOSE = MARKS = "\U000f0000", "\U000f0001"
_WITHOUT_MARKS = str.maketrans("", "", _OPEN + _CLOSE)
# A mark that lost its partner (a template may cut text anywhere) still separates what stands beside it.
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")
# Of a control text that is cut in two, one half has at least two characters (all have three or more).
# A lone "<" or ">" at the edge of a message is common and harmless.
_SHORTEST_FRAGMENT = 2

Span: TypeAlias = tuple[int, int]


class Segment(NamedTuple):
    """A piece of a prompt. Only with `special` may control texts in it become control tokens."""

    text: str
    special: bool


class ControlTextGuard:
    """Keeps text from becoming control tokens of one vocabulary. Immutable; for every thread.

    `control_texts`: what `parse_special` would turn into control tokens, and only that: tokens that llama.cpp
    parses always ("user defined" ones) cannot be prevented this way, and templates look for them.

    Not prevented: a template that deletes something in the midst of a content can join what stood around it.
    """

    __slots__ = ("_firsts", "_heads", "_lengths", "_sizes", "_tails", "_texts")

    def __init__(self, control_texts: Iterable[str]) -> None:
        texts = frozenset(text for text in control_texts if text)
        # Thousands of texts share a first character: a set per length is faster than a pattern of them all.
        self._texts = texts
        self._firsts = re.compile("|".join(sorted(re.escape(first) for first in {text[0] for text in texts})) or "(?!)")
        self._lengths = sorted({len(text) for text in texts}, reverse=True)
        self._sizes = range(max(self._lengths, default=0) - 1, _SHORTEST_FRAGMENT - 1, -1)
        self._tails = frozenset(text[:cut] for text in texts for cut in range(_SHORTEST_FRAGMENT, len(text)))
        self._heads = frozenset(text[-cut:] for text in texts for cut in range(_SHORTEST_FRAGMENT, len(text)))

    def protect(self, text: str) -> str:
        """`text` with marks around each control text in it, for a template to render and `split` to undo.

        The beginning and the end are marked too where, with what a template or another message puts beside
        them, they could complete a control text. The two mark characters are removed from `text` first.
        """
        text = text.translate(_WITHOUT_MARKS)
        spans = list(self._occurrences(text))
        head = self._head(text, spans[0][0] if spans else len(text))
        tail = self._tail(text, spans[-1][1] if spans else head[1])
        return _wrap(text, [head, *spans, tail])

    def split(self, rendered: str) -> list[Segment]:
        """The pieces of a rendering of protected text, without marks, none empty: tokenize each by itself."""
        pieces: list[Segment] = []
        position = 0
        for match in _MARKED.finditer(rendered):
            _extend(pieces, Segment(rendered[position : match.start()], True))
            _extend(pieces, Segment(match[1] or "", False))
            position = match.end()
        _extend(pieces, Segment(rendered[position:], True))
        return pieces

    def _occurrences(self, text: str) -> Iterator[Span]:
        """Control texts in `text`: leftmost, then longest, not overlapping."""
        end = 0
        for match in self._firsts.finditer(text):
            start = match.start()
            length = next((n for n in self._lengths if text[start : start + n] in self._texts), 0)
            if length and start >= end:
                end = start + length
                yield start, end

    def _head(self, text: str, limit: int) -> Span:
        """The beginning that could complete a control text; templates may trim the blanks before it."""
        start = len(text) - len(text.lstrip())
        size = next((n for n in self._sizes if text[start : start + n] in self._heads), 0)
        return start, min(start + size, limit)

    def _tail(self, text: str, limit: int) -> Span:
        """The end that could begin one."""
        stop = len(text.rstrip())
        size = next((n for n in self._sizes if text[max(0, stop - n) : stop] in self._tails), 0)
        return max(stop - size, limit), stop


def _wrap(text: str, spans: Iterable[Span]) -> str:
    pieces, position = [], 0
    for start, stop in spans:
        if start < stop:
            # In two halves: where a template cuts off one mark, the one in the midst is left.
            pieces += [text[position:start], _OPEN, text[start], _CLOSE, _OPEN, text[start + 1 : stop], _CLOSE]
            position = stop
    return "".join((*pieces, text[position:]))


def _extend(pieces: list[Segment], piece: Segment) -> None:
    """Append `piece`; two plain ones side by side are one. Special ones stay apart: a mark was between them."""
    if not piece.text:
        return
    if pieces and not (pieces[-1].special or piece.special):
        pieces[-1] = Segment(pieces[-1].text + piece.text, False)
    else:
        pieces.append(piece)
