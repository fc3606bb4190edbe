"""String formats that are enforced, and patterns, as llguidance's regular expressions.

A format allows nothing here that it forbids elsewhere.

All others are notes to the reader: where they are, a value is checked when it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

# Years 1 to 9999 are those that Python's datetime knows. No leap seconds: which there are is no matter of syntax.
_YEAR = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = r"(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_31_DAYS = r"(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
_30_DAYS = r"(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_28_DAYS = r"02-(?:0[1-9]|1[0-9]|2[0-8])"
_DATE: Final = rf"(?:{_YEAR}-(?:{_31_DAYS}|{_30_DAYS}|{_28_DAYS})|{_LEAP_YEAR}-02-29)"
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]?[a-zA-Z0-9]){0,15}"
_HOST: Final = rf"{_LABEL}(?:\.{_LABEL}){{0,6}}"
_LOCAL = r"[a-zA-Z0-9](?:[._+-]?[a-zA-Z0-9]){0,30}"

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_N = r"[0-9]{1,4}"
_SPAN = rf"(?:T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S))"
_DAYS = rf"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"

PATTERNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "date": f"^{_DATE}$",
        "time": f"^{_CLOCK}{_ZONE}$",
        "date-time": f"^{_DATE}T{_CLOCK}{_ZONE}$",
        "duration": f"^P(?:{_DAYS}{_SPAN}?|{_SPAN}|{_N}W)$",
        "uuid": "^[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
        "ipv4": rf"^{_OCTET}(?:\.{_OCTET}){{3}}$",
        "hostname": f"^{_HOST}$",
        "email": rf"^{_LOCAL}@{_LABEL}(?:\.{_LABEL}){{0,3}}\.[a-zA-Z]{{2,16}}$",
    }
)
"""Formats that are compiled as these patterns."""

NATIVE: Final = frozenset({"ipv6", "uri"})
"""Formats that llguidance enforces itself, tested to allow nothing that they forbid."""

LOOKAHEADS: Final[Mapping[str, str]] = MappingProxyType(
    {r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?[0-9]+(?:\.[0-9]+)?$"}  # a Decimal, as pydantic writes it
)
"""Well-known patterns that look around, and what matches part of the same without."""

_SPACE: Final = r"\t\n\x0B\f\r\x20\xA0\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"


def ecma(pattern: str) -> str:
    """A pattern of a schema, with what ECMAScript takes for a blank; Rust takes others."""
    blanks = {r"\s": f"[{_SPACE}]", r"\S": f"[^{_SPACE}]"}
    return re.sub(r"\\.", lambda escape: blanks.get(escape[0], escape[0]), pattern)
