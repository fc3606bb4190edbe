"""Arguments of which each is written by itself (`Tagged`), as rules. They come in the order of the schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from llama_worker._chat.format import Tagged
from llama_worker._chat.parameters import mixed_parameters, nullable_parameters, parameter_types, text_parameters
from llama_worker._constraint.formats import LOOKAHEADS, PATTERNS, ecma
from llama_worker._constraint.references import Document
from llama_worker._constraint.rules import Json, Many, Maybe, Node, Plain, Ref, Row, Schema, Span, Text, either, row
from llama_worker._constraint.schema import read_schema
from llama_worker._errors import InvalidRequestError
from llama_worker._requests import ToolSpec

_Written: TypeAlias = Callable[[str], Node]
_BEYOND: Final = frozenset({"allOf", "anyOf", "oneOf", "patternProperties", "minProperties", "maxProperties"})
_KEY: Final = r"[A-Za-z0-9_\-]{1,64}"


@dataclass(slots=True)
class TaggedArguments:
    """Writes the rules of one tool's arguments; `name` begins the names of its rules and schemas."""

    syntax: Tagged
    name: str
    where: str
    tool: ToolSpec
    document: Document
    rules: list[tuple[str, Node]] = field(default_factory=list)
    schemas: list[tuple[str, Schema]] = field(default_factory=list)
    _texts: frozenset[str] = frozenset()
    _nullable: frozenset[str] = frozenset()
    _mixed: frozenset[str] = frozenset()

    def node(self) -> Node:
        """The arguments. Fills `rules` and `schemas`. Raises InvalidRequestError."""
        schema = self.document.declared()
        properties = schema.get("properties")
        if self.tool.strict and (beyond := sorted(_BEYOND & schema.keys())):
            raise self._not_whole(beyond[0])
        if not isinstance(properties, dict):
            return self._anything(schema)
        self._texts, self._nullable = text_parameters(self.tool), nullable_parameters(self.tool)
        self._mixed = mixed_parameters(self.tool)
        required = set(schema.get("required") or ())
        if never := sorted(required - properties.keys()):
            raise self._undeclared(never[0])
        items = [(self._parameter(key, sub), key in required) for key, sub in properties.items()]
        if not self.syntax.between:
            return Row(tuple(written("") if needed else Maybe(written("")) for written, needed in items))
        return self._separated(items)

    def _separated(self, items: list[tuple[_Written, bool]]) -> Node:
        """`first`: the parameters from one on, where none was written yet; `after`: where one was."""
        first: Node = Row(())
        after: Node = Row(())
        for written, needed in reversed(items):
            here, later = row(written(""), after), row(written(self.syntax.between), after)
            first = self._rule(here if needed else either(here, first))
            after = self._rule(later if needed else either(later, after))
        return first

    def _rule(self, node: Node) -> Node:
        name = f"{self.name}_r{len(self.rules)}"
        self.rules.append((name, node))
        return Ref(name)

    def _parameter(self, key: str, schema: Any) -> _Written:
        """Writes one parameter behind a text: what opens it must be one literal with what stands before it."""
        syntax = self.syntax
        if not key or key != key.strip():
            raise InvalidRequestError(self.where, key, "this model's format cannot write a parameter of that name")
        kinds, apart = self._types(key, schema), self._told_apart(key)
        if not syntax.json_strings and (key in self._texts or apart):
            forms = [(syntax.string_open, self._rule(self._strings(key, schema)))]
            values = self._values(key, schema, kinds - {"string"}) if apart else ()
        else:
            forms, values = [], self._values(key, schema, kinds)
        forms += [(syntax.value_open + kind, self._rule(value)) for kind, value in values]

        def written(before: str) -> Node:
            ways = (row(Text(before + syntax.key_open), Plain(key), Text(opened), value) for opened, value in forms)
            return either(*ways)

        return written

    def _told_apart(self, key: str) -> bool:
        """It may be a string or something else, and what opens it says which."""
        return key in self._mixed and not self.syntax.opens_alike

    def _values(self, key: str, schema: Any, kinds: frozenset[str]) -> Iterator[tuple[str, Node]]:
        """What names the type, if anything does, and a JSON value of it with what closes it; of these types only."""
        syntax = self.syntax
        close = (
            (Text(syntax.value_close),)
            if syntax.key_again is None
            else (Text(syntax.value_close), Plain(key), Text(syntax.key_again))
        )
        every = self._types(key, schema)
        for some in [kinds] if syntax.type_close is None else [frozenset({kind}) for kind in sorted(kinds)]:
            part = schema if some == every else self._of_kinds(schema, sorted(some))
            named = "" if syntax.type_close is None else min(some) + syntax.type_close
            yield named, row(self._json(key, part), *close)

    def _types(self, key: str, schema: Any) -> frozenset[str]:
        seen = {**self.tool.parameters, "properties": {key: schema}}  # it may be declared behind a reference
        return parameter_types(self.tool.model_copy(update={"parameters": seen}))[key]

    def _of_kinds(self, schema: Any, kinds: list[str]) -> dict[str, Any]:
        """Those values of `schema` that are of one of these types."""
        if kinds == ["null"]:
            return {"type": "null"}
        plain = schema
        for _ in range(8):
            if isinstance(plain, dict) and plain.keys() == {"$ref"}:
                plain = self.document.pointed(plain["$ref"])
        plain = {} if plain is True else plain
        told = plain.get("type", kinds) if isinstance(plain, dict) else ()
        some = [one for one in (told if isinstance(told, list) else [told]) if one in (*kinds, *_also(kinds))]
        simple = isinstance(plain, dict) and not plain.keys() & {"const", "enum", "$ref", "allOf", "anyOf", "oneOf"}
        if simple and some:
            return {**plain, "type": some[0] if len(some) == 1 else some}
        return {"allOf": [schema, {"type": kinds[0] if len(kinds) == 1 else kinds}]}

    def _json(self, key: str, schema: Any) -> Node:
        name = f"{self.name}_s{len(self.schemas)}"
        read = read_schema(schema, f"{self.where}.{key}", strict=bool(self.tool.strict), root=self.document)
        self.schemas.append((name, read))
        return Json(name)

    def _strings(self, key: str, schema: Any) -> Node:
        """As `_string`; of several schemas, those that may be a string."""
        plain = self.document.resolved(schema)
        several = next((plain[way] for way in ("anyOf", "oneOf") if isinstance(plain.get(way), list)), None)
        if not several or not self._told_apart(key):
            return self._string(key, schema)
        return either(*(self._string(key, one) for one in several if "string" in self._types(key, one)))

    def _string(self, key: str, schema: Any) -> Node:
        """A string as it is, with what closes it."""
        syntax = self.syntax
        close = syntax.string_close + ("" if syntax.key_again is None else key + syntax.key_again)
        plain = self.document.resolved(schema)
        values = [plain["const"]] if "const" in plain else plain.get("enum")
        if isinstance(values, list):
            apart = self._told_apart(key)
            texts = ["null" if value is None and not apart else value for value in values]
            texts = [text for text in texts if isinstance(text, str) and close not in text]
            if not texts:
                raise InvalidRequestError(f"{self.where}.{key}", "enum", "this model's format can write none of these")
            return either(*(row(Plain(text), Text(close)) for text in texts))
        patterns, more = _patterns(plain)
        if more and self.tool.strict:
            raise self._not_whole(f"{key}: {more}")
        text = Span(close=close, patterns=patterns, without=(close,) if patterns else ())
        if not patterns or key not in self._nullable or self._told_apart(key):
            return text
        return either(text, row(Plain("null"), Text(close)))

    def _not_whole(self, keyword: str) -> InvalidRequestError:
        return InvalidRequestError(
            self.where, keyword, "this model's format cannot enforce it; leave it out, or leave strict out"
        )

    def _undeclared(self, key: str) -> InvalidRequestError:
        return InvalidRequestError(self.where, key, "it is required, but not among the properties; declare it there")

    def _anything(self, schema: Mapping[str, Any]) -> Node:
        """An object that says nothing of its properties: any, each a JSON value."""
        others = schema.get("additionalProperties", True)
        syntax = self.syntax
        free = others is not False and syntax.type_close is None and syntax.key_again is None
        if schema.get("required") and (self.tool.strict or not free):
            raise self._undeclared(schema["required"][0])
        if not free:
            return Row(())
        key = Span(close=syntax.value_open, patterns=(_KEY,))
        one = row(Text(syntax.key_open), key, self._json("additionalProperties", others), Text(syntax.value_close))
        more = Many(row(Text(syntax.between), one) if syntax.between else one)
        return Maybe(row(one, more))


def _also(kinds: list[str]) -> tuple[str, ...]:
    return ("integer",) if "number" in kinds else ()


def _patterns(schema: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """Regular expressions for the whole of a string, and the keyword, if any, that says more than they do."""
    found: list[str] = []
    more: str | None = None
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if isinstance(least, int) and (least or isinstance(most, int)):
        found.append(f"(?s:.){{{least},{most if isinstance(most, int) else ''}}}")
    for key in ("pattern", "format"):
        if key in schema:
            pattern = schema[key] if key == "pattern" else PATTERNS.get(schema[key], "")
            whole = _whole(ecma(LOOKAHEADS.get(pattern, pattern))) if isinstance(pattern, str) and pattern else None
            if whole is None:
                more = key
            else:
                found.append(whole)
    return tuple(found), more


def _whole(pattern: str) -> str | None:
    """A pattern that is searched for, as one for the whole text; None where anchors stand inside."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    if (
        "(?" in inner.replace("(?:", "")
        or "^" in inner.replace("[^", "")
        or "$" in inner
        or ((begins or ends) and _alternates(inner))
    ):
        return None
    return ("" if begins else "(?s:.*)") + f"(?:{inner})" + ("" if ends else "(?s:.*)")


def _alternates(pattern: str) -> bool:
    """Whether there is an alternative outside of all groups."""
    depth = 0
    for index, char in enumerate(pattern):
        escaped = index > 0 and pattern[index - 1] == "\\"
        depth += 0 if escaped else (char == "(") - (char == ")")
        if char == "|" and not depth and not escaped:
            return True
    return False
