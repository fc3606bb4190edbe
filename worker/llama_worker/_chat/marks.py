"""Where a text may be cut: at the borders of tags and lines, never inside `<|tool_call|>` or `[TOOL_CALLS]`."""

from __future__ import annotations

import re

_OPEN_TAG = re.compile(r"(?:<[^<>\s]*|\[[A-Z][A-Z_]*)\Z")
ANY_TAG = re.compile(r"<[^<>]*>|\[/?[A-Z][A-Z_]*\]")
_LAST_MARKER = re.compile(r"(?:<[^<>]*>\w+)?(?:<[^<>]*>|\[/?[A-Z][A-Z_ ]*\])\Z")
_ENDS = ">]}\n`"


def common_prefix(one: str, other: str) -> str:
    same, unknown = 0, min(len(one), len(other))
    while same < unknown:  # by halves: comparing slices is much faster than comparing letters
        middle = (same + unknown + 1) // 2
        same, unknown = (middle, unknown) if one[same:middle] == other[same:middle] else (same, middle - 1)
    return one[:same]


def common_suffix(one: str, other: str) -> str:
    return common_prefix(one[::-1], other[::-1])[::-1]


def whole_prefix(one: str, other: str) -> str:
    """The common prefix of both, without a tag that only begins in it."""
    return _OPEN_TAG.sub("", common_prefix(one, other))


def word_prefix(one: str, other: str) -> str:
    """The common prefix of both, without a tag or a word that only begins in it."""
    shared = whole_prefix(one, other)
    while shared and shared[-1] not in _ENDS and one[len(shared) : len(shared) + 1] not in ("", "<", "[", " ", "\n"):
        shared = shared[:-1]
    return shared


def whole_suffix(one: str, other: str) -> str:
    """The common suffix of both, from where in `one` a tag or a line begins."""
    shared = common_suffix(one, other)
    for start in range(len(one) - len(shared), len(one)):
        if (one[start] in "<[\n" and (start == 0 or one[start - 1] in _ENDS or one[start - 1].isspace())) or (
            start and one[start - 1] == "\n"
        ):
            return one[start:]
    return ""


def border_before(text: str, stop: int, floor: int) -> int:
    """The last place up to `stop`, not before `floor`, where a tag or a line has just ended."""
    stop = len(_OPEN_TAG.sub("", text[:stop]))
    while stop > floor and text[stop - 1] not in _ENDS:
        stop = len(_OPEN_TAG.sub("", text[: stop - 1]))
    return max(stop, floor)


def first_tag(text: str) -> str:
    found = ANY_TAG.match(text)
    return found[0] if found else ""


def last_marker(text: str) -> str:
    """The tag with which `text` ends, blanks aside: `<think>`, `<|open|>think<|sep|>`, `[THINK]`."""
    found = _LAST_MARKER.search(text.rstrip())
    return found[0] if found else ""
