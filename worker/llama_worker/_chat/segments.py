"""What in a rendered prompt came from whom: control tokens that users wrote, and where contents stand.

Text from users must never become control tokens. Before rendering, `ControlTextGuard.protect` wraps what
could be read as one between two private-use characters; templates trim, split and search as before, because
all else is untouched. After rendering, `ControlTextGuard.split` takes the marks out again, and what stood
between them is tokenized as plain text, in a piece of its own.

To use the token ids of replies that we produced in place of tokenizing them again, one must know where they
stand. Searching is unsafe ("a" stands in many places, and users may quote a reply), so the template is rendered
a second time with a unique word in place of each content. `find_contents` reads the one rendering along
the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
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


def find_contents(
    rendered: str, skeleton: str, words: Sequence[str], contents: Sequence[str]
) -> tuple[Span | None, ...]:
    """Where in `rendered` each of `contents` stands, as (start, stop); all None unless all is certain.

    `skeleton` is the same template's rendering with `words[i]`, unique and found nowhere else, in place of
    `contents[i]` ("" for a content that was left as it is). The rendering must read exactly as the skeleton
    with each word replaced by its content, blanks at the content's ends possibly trimmed. If it does, the
    text at a span *is* that content, and no literal of the template can be taken for it; if it does not
    anywhere, because the template looked into a content, nothing is claimed. A content that the template
    dropped, escaped or wrote more than once gets None.
    """
    nothing: tuple[Span | None, ...] = (None,) * len(words)
    index = {word: i for i, word in enumerate(words) if word}
    literals, order = _cut(skeleton, index)
    if not rendered.startswith(literals[0]):
        return nothing
    position = len(literals[0])
    spans: dict[int, list[Span]] = {}
    for i, literal in zip(order, literals[1:], strict=True):
        size = _matching_size(rendered, position, contents[i], literal)
        if size is None:
            return nothing
        spans.setdefault(i, []).append((position, position + size))
        position += size + len(literal)
    if position != len(rendered):
        return nothing
    return tuple(_only_verbatim(rendered, spans.get(i, []), content) for i, content in enumerate(contents))


def _cut(skeleton: str, index: dict[str, int]) -> tuple[list[str], list[int]]:
    """The literals of a skeleton, and between each two of them which content stands there."""
    if not index:
        return [skeleton], []
    pieces = re.split(f"({'|'.join(map(re.escape, index))})", skeleton)
    return pieces[::2], [index[word] for word in pieces[1::2]]


def _matching_size(rendered: str, position: int, content: str, literal: str) -> int | None:
    """The length of `content` as written at `position`, with `literal` behind it; None if it is not there."""
    for written in _forms(content):
        if rendered.startswith(written, position) and rendered.startswith(literal, position + len(written)):
            return len(written)
    return None


def _forms(content: str) -> Iterator[str]:
    """How templates write a content: in full, trimmed, or (tool results) inside a JSON string."""
    for left in (content, content.lstrip("\n"), content.lstrip()):
        yield from (left, left.rstrip("\n"), left.rstrip())
    yield json.dumps(content, ensure_ascii=False)[1:-1]


def _only_verbatim(rendered: str, spans: list[Span], content: str) -> Span | None:
    """The one span of `content`, if there is one and what stands there is not an escaped form."""
    if len(spans) != 1 or rendered[slice(*spans[0])].strip() != content.strip():
        return None
    return spans[0]


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
