"""Calls that were cut off, as LangChain's streams can tell them.

LangChain joins the pieces of a call's arguments and *completes* what is missing: `{"amount": 10` becomes a valid
call. A chunk cannot take back what was said before it, so a call that turns out to be none gets an end that
no completion can make an object of. All pure.
"""

from __future__ import annotations

from typing import Any

from langchain_core.utils.json import parse_partial_json

# A bracket that closes what is not open; first a quote if a string is open, two if its last sign is a backslash.
_SPOILERS = ("]", "}", '"]', '"}', '""]', '""}')


def spoiler(arguments: str) -> str:
    """What to put behind `arguments` so that LangChain reads them as invalid, whatever they are."""
    return next(end for end in _SPOILERS if _completed(arguments + end) is None)


def begun_arguments(text: str) -> dict[str, Any]:
    """The arguments of a broken call as far as they were written, for the template to show what was tried."""
    for end in ("", *reversed(_SPOILERS)):
        begun = text.removesuffix(end)
        if end and (begun == text or spoiler(begun) != end):
            continue
        value = _completed(begun)
        if isinstance(value, dict):
            return value
    return {"arguments": text} if text.strip(' "{}[]') else {}


def _completed(text: str) -> Any:
    try:
        return parse_partial_json(text)
    except (ValueError, RecursionError):
        return None
