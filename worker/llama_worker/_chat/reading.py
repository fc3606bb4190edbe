"""read_calls: the syntax of calls in what a template renders for the Probe's chats."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from llama_worker._chat.call_words import Calls, Word
from llama_worker._chat.format import CallSyntax, Part, ReasoningSyntax, Slot, Tagged, TextSyntax
from llama_worker._chat.marks import ANY_TAG, common_suffix, whole_prefix
from llama_worker._chat.probe import ARGUMENTS, CONTENT, NAMES, Probe
from llama_worker._chat.tagged import read_tagged
from llama_worker._chat.thoughts import without_thought

_INDEX = "\ue000"
"""Stands for a running number while texts are compared."""


def read_calls(probe: Probe, reasoning: ReasoningSyntax | None, text: TextSyntax) -> CallSyntax | None:
    """How calls are written, or None where that cannot be told."""
    if not probe.takes_calls:
        return None
    one = Calls.find(without_thought(probe.calls(ARGUMENTS[0]), reasoning), ARGUMENTS[:1])
    if one is None:
        return None
    if one.kind == "tagged":
        tagged = read_tagged(one, probe, reasoning)
        if tagged is None:
            return None
        arguments: Literal["json", "json_string"] | Tagged = tagged
    else:
        arguments = one.kind
    two = Calls.find(without_thought(probe.calls(*ARGUMENTS), reasoning), ARGUMENTS)
    frame = (two and _frame_of_two(two.widened(arguments))) or _frame_of_one(one.widened(arguments))
    opening = frame.section_open + _text_before_slot(frame.call)
    trigger, only_at_start = trigger_of(opening, (probe.end.strip(), text.open))
    if not trigger:
        frame = _with_blank(frame, probe.blank_before_calls)
    return CallSyntax(
        call=frame.call,
        arguments=arguments,
        section_open=frame.section_open,
        separator=frame.separator,
        section_close=frame.section_close,
        trigger=trigger,
        only_at_start=only_at_start,
        behind_text="" if trigger else _behind_text(probe, frame),
    )


def _behind_text(probe: Probe, frame: _Frame) -> str:
    """What stands between a text and a call that nothing marks, where the call begins with the tool's name."""
    said = probe.text_and_call.partition(CONTENT)[2]
    between, found, _ = said.partition(NAMES[0])
    begins_so = frame.call[0] is Slot.NAME and isinstance(frame.call[1], str) and not frame.section_open
    return between if found and begins_so else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    call: tuple[Part, ...]
    section_open: str = ""
    separator: str | None = None
    section_close: str = ""


def _with_blank(frame: _Frame, blank: str) -> _Frame:
    """Where nothing marks calls, the blank before one is what the model says first."""
    first = frame.call[0]
    if not isinstance(first, str) or not blank:
        return frame
    separator = frame.separator.removesuffix(blank) if frame.separator is not None else None
    return replace(frame, call=(blank + first, *frame.call[1:]), separator=separator)


def _frame_of_one(calls: Calls) -> _Frame:
    return _Frame(call=_parts(calls.literals(), calls.words))


def _frame_of_two(calls: Calls) -> _Frame | None:
    """Calls are equal but for their slots and running numbers: what is not is between them or around them."""
    literals = calls.literals()
    n = len(calls.words) // 2
    first, second = calls.words[:n], calls.words[n:]
    if [word.slot for word in first] != [word.slot for word in second]:
        return None
    before, inner, middle, other, after = literals[0], literals[1:n], literals[n], literals[n + 1 : -1], literals[-1]
    pairs = [_numbered(a, b) for a, b in zip(inner, other, strict=True)]
    if any(a != b for a, b in pairs):
        return None
    before, middle = _numbered_at_end(before, middle)
    after, middle = (text[::-1] for text in _numbered_at_end(after[::-1], middle[::-1], step=-1))
    opening = _from_border(common_suffix(before, middle), before)
    closing = _to_border(whole_prefix(after, middle), len(middle) - len(opening))
    section_open = before[: len(before) - len(opening)].replace(_INDEX, "0")
    return _Frame(
        call=_parts([opening, *(a for a, _ in pairs), closing], first),
        section_open=section_open,
        separator=middle[len(closing) : len(middle) - len(opening)],
        section_close=_no_more_tags(after[len(closing) :].rstrip(), section_open),
    )


def _from_border(suffix: str, whole: str) -> str:
    """From where in `suffix`, with which `whole` ends, a tag, an object or a word begins."""
    for start, letter in enumerate(suffix):
        before = whole[: len(whole) - len(suffix) + start][-1:]
        if letter == "{" or (
            (not before or before in "}>" or before.isspace()) and letter != "," and not letter.isspace()
        ):
            return suffix[start:]
    return ""


def _to_border(text: str, most: int) -> str:
    return text[:most].rstrip()


def _no_more_tags(text: str, opening: str) -> str:
    """`text` up to its nth tag, where `opening` has n: what comes then ends the turn."""
    tags = list(ANY_TAG.finditer(text))
    n = len(ANY_TAG.findall(opening))
    return text[: tags[n].start()] if len(tags) > n else text


_DIGITS = re.compile(r"(\d+)")


def _numbered(one: str, other: str) -> tuple[str, str]:
    """Both texts with the running number marked: where they differ by it only, they are equal then."""
    a, b = _DIGITS.split(one), _DIGITS.split(other)
    if len(a) != len(b):
        return one, other
    for i in range(1, len(a), 2):
        if a[i] in "01" and int(b[i]) == int(a[i]) + 1:
            a[i] = b[i] = _INDEX
    return "".join(a), "".join(b)


def _numbered_at_end(one: str, other: str, step: int = 1) -> tuple[str, str]:
    """As `_numbered`, for the last number behind which both texts are equal."""
    a, b = _DIGITS.split(one), _DIGITS.split(other)
    if len(a) < 3 or len(b) < 3 or a[-1] != b[-1]:
        return one, other
    low, high = (a[-2], b[-2]) if step > 0 else (b[-2], a[-2])
    if low in "01" and high == str(int(low) + 1):
        a[-2] = b[-2] = _INDEX
    return "".join(a), "".join(b)


def _parts(literals: list[str], words: tuple[Word, ...]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for literal, word in zip(literals, (*words, None), strict=True):
        for i, text in enumerate(literal.split(_INDEX)):
            parts += [Slot.INDEX] if i else []
            parts += [text] if text else []
        parts += [word.slot] if word else []
    return tuple(parts)


def _text_before_slot(call: tuple[Part, ...]) -> str:
    return call[0] if isinstance(call[0], str) else ""


_SAYS_CALL = re.compile("tool|call|func|invoke|action", re.IGNORECASE)


def trigger_of(opening: str, others: tuple[str, ...]) -> tuple[str, bool]:
    """The shortest beginning of `opening` that is meant: up to a tag, so that it is not the beginning of `others`
    too; without tags, what stands before the JSON. What is JSON from its first character on counts only where the
    reply begins; where nothing tells calls and text apart, it is empty."""
    if any(other.startswith(opening) for other in others):
        return "", True
    begun = [opening[: tag.end()] for tag in ANY_TAG.finditer(opening)]
    telling = [text for text in begun if not any(other.startswith(text) for other in others)]
    if telling:
        return next((text for text in telling if _SAYS_CALL.search(text)), telling[0]), False
    if opening.startswith(("<", "]")):
        return opening, False
    bare = re.match(r"[^\[{]+[\[{]", opening)
    return (bare[0], False) if bare else (opening, True)
