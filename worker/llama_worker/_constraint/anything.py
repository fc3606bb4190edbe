"""Anything: a value of which the caller's schema says nothing, held to what can be read again.

JSON itself allows a number that is infinite once it is read, and lists in lists until whoever reads them runs out of
stack. So a value of any kind has numbers as `schema.py` bounds them, and a depth.
"""

from __future__ import annotations

from typing import Any, Final

DEEPEST: Final = 32
"""Levels of lists and objects that a value of any kind may have."""
KINDS: Final = ("string", "number", "boolean", "null", "array", "object")
"""All types, "integer" being part of "number"."""
_NUMBER: Final = "any_number"
ANYTHING: Final[dict[str, Any]] = {"$ref": f"#/$defs/any{DEEPEST}"}


def definitions(most: int) -> dict[str, Any]:
    """What ANYTHING refers to: one definition for each level. `most`: what no number goes beyond."""
    found: dict[str, Any] = {_NUMBER: {"type": "number", "minimum": -most, "maximum": most}}
    scalars = [{"type": ["string", "boolean", "null"]}, {"$ref": f"#/$defs/{_NUMBER}"}]
    for level in range(DEEPEST + 1):
        inner = {"$ref": f"#/$defs/any{level - 1}"}
        nested = {"type": ["array", "object"], "items": inner, "additionalProperties": inner}
        found[f"any{level}"] = {"anyOf": [*scalars, nested] if level else scalars}
    return found
