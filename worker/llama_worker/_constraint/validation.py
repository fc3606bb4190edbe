"""Checking finished values against their schemas, where the grammar allows more than the schema does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jsonschema_rs

from llama_worker._constraint.effort import is_costly, refers_too_often
from llama_worker._constraint.plain_json import is_deeper
from llama_worker._constraint.references import Document, nodes
from llama_worker._errors import InvalidRequestError

_DEEPEST: Final = 200  # jsonschema_rs recurses; an overflow of its stack would end the process


class Validator:
    """One schema. `check` may be called from any thread. Nothing is ever fetched.

    Raises InvalidRequestError for what is no schema, or cannot be checked in bounded time, naming `where`.
    """

    def __init__(self, schema: str, where: str) -> None:
        self._document = Document(_known(schema))
        if self._document.refers_elsewhere:
            reason = "only references into the same schema are followed; put what they mean under $defs"
            raise InvalidRequestError(where, "<schema>", reason)
        if refers_too_often(self._document):
            reason = "with its references written out it is too large to be checked; refer to less at once"
            raise InvalidRequestError(where, "<schema>", reason)
        try:
            self._validator = jsonschema_rs.validator_for(self._document.root, validate_formats=True, offline=True)
        except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as exc:
            raise InvalidRequestError(where, "<schema>", f"it is no usable JSON schema: {_reason(exc)}") from None

    def check(self, value: Any) -> str | None:
        """What is wrong with `value`: where, and which keyword says so, but not what it is. None if nothing.

        Takes time in proportion to the value: one whose check would take far more counts as wrong.
        """
        if is_deeper(value, _DEEPEST):
            return f"it is nested more than {_DEEPEST} levels deep"
        if is_costly(self._document, value):
            return "its schema refers to itself in so many ways that it cannot be checked"
        for error in self._validator.iter_errors(value):
            place = "/".join(map(str, error.instance_path)) or "the value"
            return f"{place} is not as {error.kind.name} wants it"
        return None


def _known(schema: str) -> Any:
    """The schema; what names a language that nobody knows is read as the newest that has what it says."""
    value = json.loads(schema)
    if (
        isinstance(value, dict)
        and "$schema" not in value
        and any(isinstance(n.get("items"), list) for n in nodes(value))
    ):
        value["$schema"] = "https://json-schema.org/draft/2019-09/schema"  # the last one with tuples of this kind
    if isinstance(value, dict) and "json-schema.org/" not in str(value.get("$schema", "json-schema.org/")):
        del value["$schema"]
    return value


def _reason(exc: Exception) -> str:
    return str(exc).partition("\n")[0][:200]


class Enforced:
    """Stands for the schema of an answer of which the grammar says all.

    Also of each value of a key that stands twice: only those that are not declared can.
    """

    def check(self, value: Any) -> str | None:
        return None


@dataclass(frozen=True, slots=True)
class Checks:
    """What is left to check when a reply is whole."""

    tools: Mapping[str, Validator] = field(default_factory=dict)
    answer: Validator | Enforced | None = None

    def call(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with the arguments of a call; None if nothing."""
        validator = self.tools.get(name)
        return validator.check(dict(arguments)) if validator else None

    def text(self, text: str) -> str | None:
        """What is wrong with the text of a reply; None if nothing. Of a key that stands twice the last one counts."""
        if self.answer is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "it is no whole JSON value"
        return self.answer.check(value)
