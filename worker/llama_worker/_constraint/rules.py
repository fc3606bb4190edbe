"""Grammar: what a reply may be, as rules that know no vocabulary.

`lark.py` writes them for one vocabulary, `compiler.py` has them compiled. Texts of the template are `Text`: where
they hold the text of a control token, that token is meant. Nothing else ever stands for a control token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """Word for word what the template writes, control tokens included."""

    text: str


@dataclass(frozen=True, slots=True)
class Plain:
    """Word for word; what looks like a control token is none."""

    text: str


@dataclass(frozen=True, slots=True)
class Opening:
    """A few blanks or none, then such a Text."""

    text: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """What the whole of the regular expression matches."""

    regex: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Running text up to the first `close`, and with it; without one, any text.

    The text before it matches each of `patterns` (regular expressions, whole), has none of `without` in it and,
    blanks aside, does not begin with any of `unless`. What is read later is characters: so where `close` or one of
    `marks` has control tokens in it, the text does not spell it out.
    """

    close: str = ""
    patterns: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Json:
    """A JSON value of the schema that the grammar has under this name."""

    schema: str


@dataclass(frozen=True, slots=True)
class Given:
    """A grammar that the caller wrote, in Lark or GBNF. What it allows must not begin with any of `unless`."""

    kind: Literal["lark", "gbnf"]
    source: str
    unless: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ref:
    """What the rule of that name says."""

    rule: str


@dataclass(frozen=True, slots=True)
class Row:
    """One after another."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """One of these."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Maybe:
    """This or nothing."""

    node: Node


@dataclass(frozen=True, slots=True)
class Many:
    """This as often as one likes, or not at all."""

    node: Node


Node: TypeAlias = Text | Plain | Opening | Pattern | Span | Json | Given | Ref | Row | Either | Maybe | Many


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A JSON schema, read and made ready (`schema.py`).

    `field` is where the caller gave it. `exact` and `loose` are JSON texts: what is compiled, and what is left of
    it where that cannot be. `original` is what the caller gave; a value is checked by it where the grammar allows
    more. `gaps` are the keywords that the grammar does not know: with any, `exact` is not tried.
    """

    field: str
    strict: bool
    original: str
    exact: str
    loose: str
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The arguments of `tool`, or with None the text, must in the end be a value of `schema`.

    A text is not looked at where the grammar already says all of it: with `parts`, where each of these was compiled
    exactly. A call always is.
    """

    tool: str | None
    schema: Schema
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What a reply may be: the rule "start", and those that it names. Hashable: compiled grammars are kept by it.

    `schemas` by the names that Json uses. `field` is where the caller asked for it.
    """

    field: str
    rules: tuple[tuple[str, Node], ...]
    schemas: tuple[tuple[str, Schema], ...] = ()
    checks: tuple[Check, ...] = ()


def row(*nodes: Node | None) -> Node:
    """The nodes that there are, one after another."""
    there = tuple(node for node in nodes if node is not None)
    return there[0] if len(there) == 1 else Row(there)


def either(*nodes: Node) -> Node:
    return nodes[0] if len(nodes) == 1 else Either(nodes)


def length_of(node: Node) -> int:
    """How many characters all of `node` is written with; nodes themselves count nothing."""
    match node:
        case Text(text) | Plain(text) | Opening(text) | Pattern(text) | Ref(text) | Json(text):
            return len(text)
        case Given(_, source):
            return len(source)
        case Span():
            return len(node.close) + sum(map(len, (*node.patterns, *node.without, *node.unless, *node.marks)))
        case Row(nodes) | Either(nodes):
            return sum(map(length_of, nodes))
        case Maybe(inner) | Many(inner):
            return length_of(inner)
