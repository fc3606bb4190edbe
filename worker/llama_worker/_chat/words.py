"""read_word: a name, an id or a key, which ends where the text behind it begins."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llama_worker._chat.source import BLANKS, MalformedError, Reading, Source

_BLANK_RUN = re.compile(r"[ \t\r\n]*")
_LONGEST = 1024
"""Within so many characters a word must have come to its end, unless longer ones are known."""


@dataclass(frozen=True, slots=True)
class WordEnd:
    """With what a word ends: blanks, if any, then `mark`; any blank where `mark` is ""."""

    mark: str

    @classmethod
    def before(cls, text: str) -> WordEnd:
        """The end of a word behind which `text` stands, which is not empty."""
        return cls((text.split() or [""])[0])

    def first_in(self, text: str) -> tuple[int, int] | None:
        """Where it stands first: its start and its stop."""
        if not self.mark:
            return next(((at, at + 1) for at, char in enumerate(text) if char in BLANKS), None)
        at = text.find(self.mark)
        return (len(text[:at].rstrip(BLANKS)), at + len(self.mark)) if at >= 0 else None

    def stands_at(self, text: str, at: int) -> bool | None:
        """None: that depends on what comes behind `text`."""
        blanks = _BLANK_RUN.match(text, at)
        start = blanks.end() if blanks else at
        if not self.mark:
            return None if at == len(text) else start > at
        if text.startswith(self.mark, start):
            return True
        return None if self.mark.startswith(text[start:]) else False


def read_word(source: Source, ends: Sequence[WordEnd], known: Collection[str], what: str) -> Reading[str]:
    """Read up to the first of `ends`, which stays unread. Blanks before the word are skipped.

    A word of `known` may have an end in itself; the longest that stands there is taken.
    Raises MalformedError where there is no word or no end of it.
    """
    longest = max([_LONGEST, *(len(word) + 64 for word in known)])
    while True:
        source.take_blanks()
        text = source.peek(longest)
        length = _length(text, ends, known, last=len(text) == longest)
        if length:
            return source.take(length)
        if length == 0 or len(text) == longest:
            raise MalformedError(f"{what} is missing or does not come to its end")
        yield from source.more()


def _length(text: str, ends: Sequence[WordEnd], known: Collection[str], *, last: bool) -> int | None:
    """The length of the word that stands at the start of `text`; None: more of it must be seen."""
    sure = 0
    for word in known:
        stands = _stands(text, word, ends)
        if stands is None and not last and len(word) > sure:
            return None
        if stands:
            sure = max(sure, len(word))
    if sure:
        return sure
    # That which is whole first ends the word: so nothing that comes later can change it.
    found = [span for end in ends if (span := end.first_in(text))]
    return min(found, key=lambda span: (span[1], span[0]))[0] if found else None


def _stands(text: str, word: str, ends: Sequence[WordEnd]) -> bool | None:
    if not text.startswith(word):
        return None if word.startswith(text) else False
    stands = [end.stands_at(text, len(word)) for end in ends]
    return True if True in stands else None if None in stands else False
