"""The keywords of a JSON schema: which a grammar knows, which must be checked afterwards, and which are refused."""

from __future__ import annotations

from typing import Any, Final

from llama_worker._constraint.formats import PATTERNS
from llama_worker._constraint.places import LISTS, MAPS, SINGLES

VALUES: Final = frozenset(
    [
        "type",
        "const",
        "enum",
        "required",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "minLength",
        "maxLength",
        "pattern",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    ]
)
FIXED: Final = frozenset({"const", "enum", "multipleOf"})
RANGE: Final = frozenset({"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
NUMBERS: Final = VALUES - {"type", "const", "enum", "required", "pattern"}
# What llguidance does not know. A model keeps to most of these by itself often enough to be worth checking.
GAPS: Final = frozenset(
    [
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedItems",
        "unevaluatedProperties",
    ]
)
REFUSED: Final = {
    "not": "say what is allowed instead, with enum, anyOf or pattern",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}
_KEPT: Final = frozenset(
    {*MAPS, *LISTS, *SINGLES, *VALUES, *GAPS, *REFUSED, "$ref", "format", "$id", "additionalItems"}
)


def plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Without annotations, and with the names of properties said where llguidance looks for them."""
    kept = {key: value for key, value in schema.items() if key in _KEPT}
    names = kept.get("propertyNames")
    if not isinstance(names, dict) or {"properties", "patternProperties"} & set(kept):
        return kept
    rule, others = {key: value for key, value in names.items() if key != "type"}, kept.get("additionalProperties", True)
    if rule.keys() == {"enum"} and isinstance(rule["enum"], list):
        said: dict[str, Any] = {"properties": {str(name): others for name in rule["enum"]}}
    elif rule.keys() == {"pattern"} or (rule.keys() == {"format"} and rule["format"] in PATTERNS):
        said = {"patternProperties": {rule.get("pattern") or PATTERNS[rule["format"]]: others}}
    else:
        return kept
    return {**{key: kept[key] for key in kept if key != "propertyNames"}, **said, "additionalProperties": False}
