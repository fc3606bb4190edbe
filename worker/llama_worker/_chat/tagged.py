"""read_tagged: how arguments are written that are not JSON, each by itself."""

from __future__ import annotations

from typing import Any

from llama_worker._chat.call_words import Calls, place_of
from llama_worker._chat.format import ReasoningSyntax, Slot, Tagged
from llama_worker._chat.marks import whole_prefix
from llama_worker._chat.probe import ARGUMENTS, KEYS, Probe
from llama_worker._chat.thoughts import without_thought


def read_tagged(one: Calls, probe: Probe, reasoning: ReasoningSyntax | None) -> Tagged | None:
    """From a call with (string, number), one with (number, string) and one without arguments."""
    swapped = Calls.find(without_thought(probe.calls(ARGUMENTS[1]), reasoning), (ARGUMENTS[1],))
    empty = without_thought(probe.calls({}), reasoning)
    blocks = [block for block in (_block(one, empty), _block(swapped, empty)) if block is not None]
    if len(blocks) != 2:
        return None
    return _tagged(_between(blocks[0], ARGUMENTS[0]), _between(blocks[1], ARGUMENTS[1]))


def _block(calls: Calls | None, empty: str) -> str | None:
    """The arguments whole: what a call with them has and a call without them has not."""
    if calls is None:
        return None
    at = next(i for i, word in enumerate(calls.words) if word.slot is Slot.ARGUMENTS)
    words = calls.words
    start = words[at - 1].stop if at else 0
    stop = words[at + 1].start if at + 1 < len(words) else len(calls.text)
    full, tail = calls.text[start:stop], calls.text[stop:]
    bare = empty.removesuffix(tail)[start:] if empty.startswith(calls.text[:start]) else ""
    before = whole_prefix(full, bare)
    after = bare[len(before) :]
    if not bare or not full.endswith(after) or len(before) + len(after) > len(full):
        return None
    return full[len(before) : len(full) - len(after)]


def _between(block: str, given: dict[str, Any]) -> tuple[str, str, str, str, str] | None:
    """What stands before the first key, between it and its value, and so on to the end of the block."""
    places = [place_of(block, key, value) for key, value in given.items()]
    if None in places:
        return None
    (k1, k1_stop, v1, v1_stop), (k2, k2_stop, v2, v2_stop) = places  # type: ignore[misc]
    return block[:k1], block[k1_stop:v1], block[v1_stop:k2], block[k2_stop:v2], block[v2_stop:]


def _tagged(a: tuple[str, ...] | None, b: tuple[str, ...] | None) -> Tagged | None:
    """`a` of a string and a number, `b` of a number and a string."""
    if a is None or b is None or a[0] != b[0] or a[1] != b[3] or a[3] != b[1]:
        return None
    key_open, string_open, value_open = a[0], a[1], a[3]
    value_close, _, key_again = a[4].partition(KEYS[1])
    string_close, _, _ = b[4].partition(KEYS[1])
    value_open, type_close = _type_in(string_open, value_open)
    echo = KEYS[1] in a[4]
    first_close = f"{string_close}{KEYS[0]}{key_again}" if echo else string_close
    middle = a[2]
    if not middle.startswith(first_close) or not middle.endswith(key_open):
        return None
    return Tagged(
        key_open=key_open,
        string_open=string_open,
        string_close=string_close,
        value_open=value_open,
        value_close=value_close,
        between=middle[len(first_close) : len(middle) - len(key_open)],
        key_again=key_again if echo else None,
        type_close=type_close,
    )


def _type_in(string_open: str, value_open: str) -> tuple[str, str | None]:
    """`value_open` up to the name of the type, and what comes after it."""
    before, named, after = value_open.partition("number")
    return (before, after) if named and f"{before}string{after}" == string_open else (value_open, None)
