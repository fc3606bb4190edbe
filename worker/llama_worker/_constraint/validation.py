"""Checking finished values against their schemas, where the grammar allows more than the schema does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jsonschema_rs

from llama_worker._constraint.plain_json import is_deeper
from llama_worker._errors import InvalidRequestError

_DEEPEST: Final = 200  # jsonschema_rs recurses; an overflow of its stack would end the process


class Validator:
    """One schema. `check` may be called from any thread. Nothing is ever fetched.

    Raises InvalidRequestError for what is no schema, naming `where`.
    """

    def __init__(self, schema: str, where: str) -> None:
        try:
            self._validator = jsonschema_rs.validator_for(_known(schema), validate_formats=True, offline=True)
        except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as exc:
            raise InvalidRequestError(where, "<schema>", f"it is no usable JSON schema: {_reason(exc)}") from None

    def check(self, value: Any) -> str | None:
        """What is wrong with `value`: where, and which keyword says so, but not what it is. None if nothing."""
        if is_deeper(value, _DEEPEST):
            return f"it is nested more than {_DEEPEST} levels deep"
        for error in self._validator.iter_errors(value):
            place = "/".join(map(str, error.instance_path)) or "the value"
            return f"{place} is not as {error.kind.name} wants it"
        return None


def _known(schema: str) -> Any:
    """The schema; what names a language that nobody knows is read as the newest."""
    value = json.loads(schema)
    if isinstance(value, dict) and "json-schema.org/" not in str(value.get("$schema", "json-schema.org/")):
        del value["$schema"]
    return value


def _reason(exc: Exception) -> str:
    return str(exc).partition("\n")[0][:200]


@dataclass(frozen=True, slots=True)
class Checks:
    """What is left to check when a reply is whole: nothing, where its grammar says all."""

    tools: Mapping[str, Validator] = field(default_factory=dict)
    answer: Validator | None = None

    def call(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with the arguments of a call; None if nothing."""
        validator = self.tools.get(name)
        return validator.check(dict(arguments)) if validator else None

    def text(self, text: str) -> str | None:
        """What is wrong with the text of a reply; None if nothing."""
        if self.answer is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "it is no whole JSON value"
        return self.answer.check(value)
