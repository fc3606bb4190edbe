"""Calls: where the Probe's names, ids and arguments stand in a rendered text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from llama_worker._chat.format import Slot, Tagged
from llama_worker._chat.probe import IDS, KEYS, NAMES

Kind: TypeAlias = Literal["json", "json_string", "tagged"]


@dataclass(frozen=True, slots=True)
class Word:
    """A slot's word in a text, start to stop. `call` counts from 0."""

    start: int
    stop: int
    slot: Slot
    call: int


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls in `text`, one after another, and how their arguments are written."""

    text: str
    words: tuple[Word, ...]
    kind: Kind

    @classmethod
    def find(cls, text: str, arguments: tuple[dict[str, Any], ...]) -> Calls | None:
        for kind, find in _FINDERS:
            spans = [find(text, given) for given in arguments]
            if None in spans:
                continue
            words = [Word(*span, Slot.ARGUMENTS, i) for i, span in enumerate(spans) if span]
            words += [word for word in _names_and_ids(text, len(arguments)) if not _inside(word, words)]
            words.sort(key=lambda word: word.start)
            in_order = all(a.call <= b.call for a, b in pairwise(words))
            named = all(any(w.slot is Slot.NAME and w.call == i for w in words) for i in range(len(arguments)))
            if in_order and named:
                return cls(text, tuple(words), kind)
        return None

    def literals(self) -> list[str]:
        """What stands before, between and after the words: one more than words."""
        borders = [0, *(place for word in self.words for place in (word.start, word.stop)), len(self.text)]
        return [self.text[borders[i] : borders[i + 1]] for i in range(0, len(borders), 2)]

    def widened(self, arguments: Literal["json", "json_string"] | Tagged) -> Calls:
        """With the first key's opening and the last value's closing as parts of the arguments."""
        if not isinstance(arguments, Tagged):
            return self
        closings = [_closing(arguments, close) for close in (arguments.value_close, arguments.string_close)]
        words = tuple(
            replace(word, start=word.start - len(arguments.key_open), stop=word.stop + len(closings[word.call]))
            if word.slot is Slot.ARGUMENTS
            else word
            for word in self.words
        )
        return replace(self, words=words)


def _closing(tagged: Tagged, close: str) -> str:
    return close if tagged.key_again is None else f"{close}{KEYS[1]}{tagged.key_again}"


def _inside(word: Word, others: list[Word]) -> bool:
    return any(other.start <= word.start < other.stop for other in others)


def _names_and_ids(text: str, n: int) -> Iterator[Word]:
    for slot, words in ((Slot.NAME, NAMES[:n]), (Slot.ID, IDS[:n])):
        for call, word in enumerate(words):
            for found in re.finditer(word, text):
                yield Word(*found.span(), slot, call)


_DECODER = json.JSONDecoder()


def _decoded(text: str, opening: str) -> Iterator[tuple[int, int, Any]]:
    for found in re.finditer(opening, text):
        try:
            value, stop = _DECODER.raw_decode(text, found.start())
        except ValueError:
            continue
        yield found.start(), stop, value


def _find_object(text: str, given: dict[str, Any]) -> tuple[int, int] | None:
    return next(((start, stop) for start, stop, value in _decoded(text, r"\{") if value == given), None)


def _find_object_text(text: str, given: dict[str, Any]) -> tuple[int, int] | None:
    for start, stop, value in _decoded(text, '"'):
        try:
            if isinstance(value, str) and json.loads(value) == given:
                return start, stop
        except ValueError:
            continue
    return None


def _find_tagged(text: str, given: dict[str, Any]) -> tuple[int, int] | None:
    """From the first key to the last value."""
    places = [place_of(text, key, value) for key, value in given.items()]
    if None in places:
        return None
    (first, _, _, first_stop), (second, _, _, last_stop) = places  # type: ignore[misc]
    return (first, last_stop) if first_stop <= second else None


def place_of(text: str, key: str, value: Any) -> tuple[int, int, int, int] | None:
    """Where `key` and `value` stand: start and stop of either."""
    for written in (str(value), json.dumps(value)[1:-1] if isinstance(value, str) else str(value)):
        at = text.find(written)
        before = text.rfind(key, 0, at) if at >= 0 else -1
        if before >= 0:
            return before, before + len(key), at, at + len(written)
    return None


_FINDERS: tuple[tuple[Kind, Callable[[str, dict[str, Any]], tuple[int, int] | None]], ...] = (
    ("json", _find_object),
    ("json_string", _find_object_text),
    ("tagged", _find_tagged),
)
