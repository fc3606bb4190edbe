"""Patterns: the few regular expressions with which a `response_template` marks calls, written and read.

Texts, groups for what varies, and a choice of texts: nothing that would have to be tried out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import TypeAlias

from llama_worker._chat.format import Part, Slot


class Sign(Enum):
    """What a pattern may have beside texts and slots."""

    BLANKS = r"\s*"
    START = r"\A"
    END = r"\Z"
    KEY = "key"
    VALUE = "value"
    KEY_AGAIN = "(?P=key)"


Choice: TypeAlias = tuple[str, ...]
"""One of these texts; "" is among them where there may be none."""
Token: TypeAlias = str | Slot | Sign | Choice

_SLOTS = {Slot.NAME: r"(?P<name>[^\s\"'<>{}()\[\]]+)", Slot.ID: r"(?P<id>[\w.:-]+)", Slot.INDEX: r"\d+"}
_GROUPS: dict[str, Slot | Sign] = {"name": Slot.NAME, "id": Slot.ID, "key": Sign.KEY, "value": Sign.VALUE}
_PIECE = re.compile(
    r"""(?P<sign>\\[AZ]) | (?P<blanks>\\s[*+]?) | (?P<digits>\\d\+)
    | \(\?P<(?P<group>\w+)>(?:\\.|\[(?:\\.|[^\]\\])*\]|[^()\[\]\\])*\) | \(\?P=(?P<again>\w+)\)
    | \(\?:(?P<choice>(?:\\.|[^()\[\]\\.*+?^$])*)\)(?P<maybe>\??) | \\(?P<escaped>.) | (?P<letter>[^\\.*+?^$|()\[\]{}])
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPES = {"n": "\n", "t": "\t"}


def pattern_of(parts: Sequence[Part]) -> str:
    """The pattern that matches `parts`, none of which are arguments."""
    written: list[str] = []
    for at, part in enumerate(parts):
        again = part is Slot.NAME and part in parts[:at]
        written.append(re.escape(part) if isinstance(part, str) else "(?P=name)" if again else _SLOTS[part])
    return "".join(written)


def choice_of(*texts: str) -> str:
    """The pattern for one of `texts`."""
    return re.escape(texts[0]) if len(set(texts)) == 1 else f"(?:{'|'.join(map(re.escape, texts))})"


def read_pattern(pattern: str) -> list[Token]:
    """The tokens of `pattern`, texts joined. Raises ValueError for anything that is not such a pattern."""
    tokens: list[Token] = []
    at = 0
    while at < len(pattern):
        piece = _PIECE.match(pattern, at)
        if piece is None:
            raise ValueError(
                f"{pattern[at : at + 12]!r} is more than texts, choices of texts and the groups {_names()}"
            )
        token = _token(piece)
        if isinstance(token, str) and tokens and isinstance(tokens[-1], str):
            tokens[-1] += token
        else:
            tokens.append(token)
        at = piece.end()
    return tokens


def _token(piece: re.Match[str]) -> Token:
    if piece["group"] or piece["again"]:
        return _group(piece)
    if piece["choice"] is not None:
        texts = [_text(text) for text in re.split(r"(?<!\\)\|", piece["choice"])]
        return (*texts, "") if piece["maybe"] else tuple(texts)
    if piece["sign"] or piece["blanks"]:
        return Sign(piece["sign"]) if piece["sign"] else Sign.BLANKS
    if piece["digits"]:
        return Slot.INDEX
    return piece["letter"] or _letter(piece["escaped"])


def _group(piece: re.Match[str]) -> Slot | Sign:
    name = piece["group"] or piece["again"]
    if name not in _GROUPS:
        raise ValueError(f"the group {name!r} is none of {_names()}")
    return Sign.KEY_AGAIN if piece["again"] == "key" else _GROUPS[name]


def _names() -> str:
    return ", ".join(_GROUPS)


def _text(escaped: str) -> str:
    return re.sub(r"\\(.)", lambda found: _letter(found[1]), escaped, flags=re.DOTALL)


def _letter(escaped: str) -> str:
    if escaped.isalnum() and escaped not in _ESCAPES:
        raise ValueError(f"\\{escaped} is more than a text")
    return _ESCAPES.get(escaped, escaped)
