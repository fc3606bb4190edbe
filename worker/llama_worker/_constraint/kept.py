"""KeptGrammars: compiled grammars by what they were compiled of, as many as are cheap to keep."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from llama_worker._constraint.rules import Grammar, length_of

MOST_KEPT: Final = 64
MOST_FREE: Final = 8
"""Of those that the caller wrote: their lexers may come to some 20 MB each while they are used."""
MOST_WEIGHT: Final = 128 << 20
"""Bytes, as estimated, of all together."""
COMPILED: Final = 150
"""Bytes that a character of a schema or rule takes once it is compiled, about: 40 in an enum, 200 in an object of
strings (measured by what the process grows)."""
_AS_TEXT: Final = 2
"""And one that is only kept: descriptions, and what is compiled where the rest cannot be."""
_FREE: Final = ("response_format.regex", "response_format.grammar")

T = TypeVar("T")


class KeptGrammars(Generic[T]):
    """The longest unused goes first; of the free ones, only by another one of them. Any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Grammar, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.weight = 0
        """What all of them weigh."""

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Grammar]:
        return iter([*self._kept])

    def get(self, grammar: Grammar) -> T | None:
        with self._lock:
            found = self._kept.get(grammar)
            if found is None:
                return None
            self._kept.move_to_end(grammar)
            return found[0]

    def keep(self, grammar: Grammar, compiled: T) -> None:
        """One that is too heavy by itself is kept alone: whoever asks for it will ask again."""
        weight = weight_of(grammar)
        with self._lock:
            self._drop(grammar)
            self._kept[grammar] = compiled, weight
            self.weight += weight
            free = [kept for kept in self._kept if kept.field in _FREE]
            for kept in free[: max(0, len(free) - MOST_FREE)]:
                self._drop(kept)
            while len(self._kept) > 1 and (len(self._kept) > MOST_KEPT or self.weight > MOST_WEIGHT):
                self._drop(next(iter(self._kept)))

    def _drop(self, grammar: Grammar) -> None:
        _, weight = self._kept.pop(grammar, (None, 0))
        self.weight -= weight


def weight_of(grammar: Grammar) -> int:
    """About the bytes that it takes: in proportion to what it is made of."""
    schemas = {id(schema): schema for schema in (*dict(grammar.schemas).values(), *(c.schema for c in grammar.checks))}
    texts = sum(len(schema.original) + len(schema.loose) for schema in schemas.values())
    compiled = sum(len(schema.exact) for _, schema in grammar.schemas)
    compiled += sum(length_of(node) for _, node in grammar.rules)
    return texts * _AS_TEXT + compiled * COMPILED
