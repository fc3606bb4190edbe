"""Detokenizer: token ids in, text out, never half a character."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence


class Detokenizer:
    """Turns the tokens of one reply into text as they come. For one reply and one thread at a time.

    All that is fed and flushed, joined, equals the pieces' bytes decoded in one go with "replace": bytes
    that may still become a character are held back (3 at most), bytes that cannot become U+FFFD at once
    (CPython lets half a surrogate, ED A0…BF, wait for one byte more).

    `strip_leading_space` removes one space at the very start, which SentencePiece vocabularies add.
    """

    __slots__ = ("_pieces", "_strip", "_tail")

    def __init__(self, pieces: Sequence[bytes], *, strip_leading_space: bool = False) -> None:
        self._pieces = pieces
        self._strip = strip_leading_space
        self._tail = b""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is held back."""
        return not self._tail

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often "" in the midst of a character.

        Raises IndexError for an id beyond the vocabulary. Never blocks.
        """
        data = self._tail + self._pieces[token_id]
        text, used = utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return self._without_space(text) if self._strip else text

    def flush(self) -> str:
        """The end of the reply: what was held back becomes U+FFFD. A second call returns ""."""
        text, self._tail = self._tail.decode("utf-8", "replace"), b""
        return text

    def _without_space(self, text: str) -> str:
        self._strip = not text
        return text.removeprefix(" ")
