"""Literal: a text that stands word for word in a call, but for its blanks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama_worker._chat.source import BLANKS, CutOffError, MalformedError, Reading, Source

_ATOMS = re.compile(r"[ \t\r\n]+|[^ \t\r\n]+")
_BLANK_RUN = re.compile(r"[ \t\r\n]*")
_PIECE = 256
"""How much is looked at in one go: what is not read after all is put back."""


@dataclass(frozen=True, slots=True)
class Literal:
    """Pieces that stand one after another, compared exactly; None is any run of blanks, also none."""

    atoms: tuple[str | None, ...]

    @classmethod
    def of(cls, text: str, *, after_blanks: bool = False) -> Literal:
        """`text` without its blanks at the end: whoever reads on skips those."""
        atoms = tuple(None if atom[0] in BLANKS else atom for atom in _ATOMS.findall(text.rstrip(BLANKS)))
        return cls((None, *atoms) if after_blanks and atoms[:1] != (None,) else atoms)

    @classmethod
    def exact(cls, text: str) -> Literal:
        """`text` as it is, blanks included."""
        return cls((text,) if text else ())

    @property
    def is_empty(self) -> bool:
        return self.size == 0

    @property
    def size(self) -> int:
        """Its characters, without blanks."""
        return sum(len(atom) for atom in self.atoms if atom is not None)

    def may_begin_with(self, text: str) -> bool:
        reader = LiteralReader(self)
        reader.feed(text)
        return not reader.failed


class LiteralReader:
    """Compares a text with a literal as it comes. `read` counts the characters up to the end or the mismatch."""

    __slots__ = ("_atoms", "_index", "_offset", "failed", "literal", "read")

    def __init__(self, literal: Literal) -> None:
        self.literal = literal
        self._atoms = literal.atoms
        self._index = 0
        self._offset = 0
        self.failed = False
        self.read = 0

    @property
    def matched(self) -> bool:
        return self._index == len(self._atoms)

    @property
    def begun(self) -> str:
        """What was read of a piece that is not whole yet."""
        atom = None if self.matched else self._atoms[self._index]
        return (atom or "")[: self._offset]

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text) and not self.failed and not self.matched:
            atom = self._atoms[self._index]
            at = self._skip_blanks(text, at) if atom is None else self._compare(atom, text, at)
        self.read += at

    def _skip_blanks(self, text: str, at: int) -> int:
        found = _BLANK_RUN.match(text, at)
        end = found.end() if found else at
        self._index += end < len(text)
        return end

    def _compare(self, atom: str, text: str, at: int) -> int:
        wanted = atom[self._offset : self._offset + len(text) - at]
        size = len(wanted)
        if not text.startswith(wanted, at):
            self.failed = True
            size = next(i for i, char in enumerate(wanted) if text[at + i] != char)
        self._offset += size
        if self._offset == len(atom):
            self._index, self._offset = self._index + 1, 0
        return at + size


def read_literal(source: Source, literal: Literal, what: str) -> Reading[None]:
    """Read `literal`. Raises MalformedError at the first piece that is another; that one stays unread."""
    reader = LiteralReader(literal)
    while not reader.matched:
        if source.is_empty:
            yield from source.more()
        before = reader.read
        reader.feed(source.peek(_PIECE))
        source.take(reader.read - before)
        if reader.failed:
            # What looked like the piece may be the beginning of something else, another call for one.
            source.untake(reader.begun)
            raise MalformedError(f"something else stands in the place of {what}")


def which_comes(source: Source, literals: Sequence[Literal]) -> Reading[Literal | None]:
    """Which of `literals` stands next, the longest one; None for none of them. Nothing is read.

    At the end of the reply the longest that has come whole wins; without one CutOffError is raised.
    """
    readers = [LiteralReader(literal) for literal in sorted(literals, key=lambda one: one.size, reverse=True)]
    seen: list[str] = []
    try:
        while (winner := next((reader for reader in readers if not reader.failed), None)) and not winner.matched:
            if source.is_empty:
                yield from source.more()
            seen.append(source.borrow(_PIECE))
            for reader in readers:
                reader.feed(seen[-1])
    except CutOffError:
        winner = next((reader for reader in readers if reader.matched), None)
        if winner is None:
            raise
    finally:
        source.put_back("".join(seen))
    return winner.literal if winner else None
