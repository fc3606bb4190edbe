"""Source: the text of a reply as it comes, read by generators that wait for more of it.

A reader is a generator: it yields when it needs more text and returns what it read. It reads each character once;
what may still become one thing or another stays unread or is put back.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeAlias, TypeVar

_T = TypeVar("_T")
Reading: TypeAlias = Generator[None, None, _T]

BLANKS = " \t\r\n"
_BLANK_RUN = re.compile(r"[ \t\r\n]*")


class CutOffError(Exception):
    """The reply has ended inside of what is being read."""


class MalformedError(Exception):
    """What stands there is not what must stand there; the message says what is wrong, without the text."""


class Source:
    """Text that has come and is not read yet. For one reply and one thread at a time."""

    __slots__ = ("_at", "_ended", "_kept", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept: list[str] | None = None
        self._ended = False

    @property
    def rest(self) -> str:
        return self._text[self._at :]

    @property
    def size(self) -> int:
        return len(self._text) - self._at

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._text)

    def feed(self, text: str) -> None:
        self._text = self.rest + text if self._at < len(self._text) else text
        self._at = 0

    def end(self) -> None:
        """No more will come."""
        self._ended = True

    def more(self) -> Reading[None]:
        """Wait for more text. Raises CutOffError where none will come."""
        if not self._ended:
            yield
        if self._ended:
            raise CutOffError

    def take(self, n: int) -> str:
        """Read the next characters, `n` at most."""
        piece = self.borrow(n)
        if self._kept is not None:
            self._kept.append(piece)
        return piece

    def borrow(self, n: int) -> str:
        """Take the next characters, `n` at most, that will be put back."""
        piece = self._text[self._at : self._at + n]
        self._at += len(piece)
        return piece

    def take_all(self) -> str:
        """Read what is there."""
        return self.take(len(self._text) - self._at)

    def peek(self, n: int) -> str:
        """The next characters, `n` at most; they stay unread."""
        return self._text[self._at : self._at + n]

    def take_blanks(self) -> str:
        return self.take(self.match(_BLANK_RUN))

    def find(self, text: str) -> int:
        """How many characters from here `text` stands, -1 where it does not."""
        found = self._text.find(text, self._at)
        return found - self._at if found >= 0 else -1

    def match(self, pattern: re.Pattern[str]) -> int:
        """The length of what the pattern matches here; 0 where it does not match."""
        found = pattern.match(self._text, self._at)
        return found.end() - self._at if found else 0

    def starts_with(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def before(self, marker: str) -> int:
        """How many characters from here surely stand before `marker`, which is not (wholly) there."""
        first = max(self._at, len(self._text) - len(marker) + 1)
        while (first := self._text.find(marker[0], first)) >= 0:
            if marker.startswith(self._text[first:]):
                return first - self._at
            first += 1
        return len(self._text) - self._at

    def keep(self) -> None:
        """Remember what is read from now on."""
        self._kept = []

    def kept(self) -> str:
        """What was read since `keep`, which is forgotten then."""
        kept = "".join(self._kept or ())
        self.forget()
        return kept

    def forget(self) -> None:
        self._kept = None

    def untake(self, text: str) -> None:
        """Make `text`, which was taken last, unread."""
        if self._kept is not None and text:
            self._kept = ["".join(self._kept)[: -len(text)]]
        self.put_back(text)

    def put_back(self, text: str) -> None:
        """Return what was borrowed, whole."""
        if len(text) <= self._at:
            self._at -= len(text)
        else:
            self._text, self._at = text + self.rest, 0
