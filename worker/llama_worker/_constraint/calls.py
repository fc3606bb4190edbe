"""The calls of one turn, as rules: the parts of the template's CallSyntax, one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from llama_worker._chat.calls import around_name, beginning_of, name_in, string_is_open
from llama_worker._chat.format import CallSyntax, Part, Slot, Tagged
from llama_worker._constraint.escaped import EscapedJson
from llama_worker._constraint.plain_json import json_text
from llama_worker._constraint.references import Document
from llama_worker._constraint.rules import Check, Json, Many, Node, Pattern, Plain, Ref, Row, Schema, Text, either, row
from llama_worker._constraint.schema import arguments_schema, read_schema
from llama_worker._constraint.tagged import TaggedArguments
from llama_worker._errors import InvalidRequestError, UnsupportedFeatureError
from llama_worker._requests import ToolSpec

_MOST_TOOLS: Final = 128  # a second or two to compile, once
_MORE: Final = "more_calls"


@dataclass(slots=True)
class Calls:
    """Writes the rules of the calls that `tools` allow. `parallel`: several in one turn."""

    syntax: CallSyntax
    tools: Sequence[ToolSpec]
    parallel: bool
    rules: list[tuple[str, Node]] = field(default_factory=list)
    schemas: list[tuple[str, Schema]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    _arguments: dict[str, Node] = field(default_factory=dict)

    def prepare(self) -> None:
        """Read the tools. Raises InvalidRequestError and UnsupportedFeatureError."""
        if len(self.tools) > _MOST_TOOLS:
            raise InvalidRequestError("tools", f"<{len(self.tools)} tools>", f"more than {_MOST_TOOLS}; give fewer")
        for index, tool in enumerate(self.tools):
            if tool.name != tool.name.strip():
                raise InvalidRequestError("tools", tool.name, "a name neither begins nor ends with a blank")
            try:
                self._arguments[tool.name] = self._arguments_of(tool, f"t{index}")
            except RecursionError:  # the caller's own stack is nearly full
                where = f"tools.{tool.name}.parameters"
                raise InvalidRequestError(where, "<schema>", "nested too deeply for the stack that is left") from None

    def whole(self) -> Node:
        """All calls of a turn, from the first character on."""
        return self._turn(self._any(""))

    def behind_trigger(self) -> Node:
        """All calls of a turn, without the trigger at their beginning."""
        return self._turn(self._any(self.syntax.trigger))

    def behind_text(self) -> list[tuple[str, Node]]:
        """For each tool how its call begins behind a text, and all calls of a turn without that beginning."""
        begun = [(tool, *beginning_of(self.syntax, tool.name)) for tool in self.tools if self.syntax.behind_text]
        return [(self.syntax.behind_text + text, self._turn(self._call(tool, rest))) for tool, text, rest in begun]

    def marks_behind_text(self) -> tuple[str, ...]:
        """What is the same in all beginnings that `behind_text` tells."""
        before, behind = around_name(self.syntax)
        return (self.syntax.behind_text + before, *filter(None, [behind]))

    def _any(self, said: str) -> Node:
        """One call of any tool, without `said` at its beginning."""
        parts = _cut((self.syntax.section_open, *self.syntax.call), said)
        return either(*(self._call(tool, parts) for tool in self.tools))

    def _turn(self, first: Node) -> Node:
        more = self._more(self.syntax.separator) if self.parallel and self.syntax.separator is not None else None
        return row(first, more, Text(self.syntax.section_close))

    def _more(self, separator: str) -> Node:
        """All calls after the first: one rule, for behind a text each tool's first call has them behind it."""
        if _MORE not in dict(self.rules):
            parts = (separator, *self.syntax.call)
            self.rules.append((_MORE, Many(either(*(self._call(tool, parts) for tool in self.tools)))))
        return Ref(_MORE)

    def _call(self, tool: ToolSpec, parts: Sequence[Part]) -> Node:
        nodes: list[Node] = []
        for part, after in zip(parts, (*parts[1:], ""), strict=True):
            match part:
                case str():
                    nodes.append(Text(part))
                case Slot.NAME:
                    nodes.append(Plain(name_in(self.syntax, tool.name)))
                case Slot.ID:
                    nodes.append(Pattern(_id_pattern(after)))
                case Slot.INDEX:
                    nodes.append(Pattern("[0-9]{1,3}"))
                case Slot.ARGUMENTS:
                    nodes.append(self._arguments[tool.name])
        return Row(tuple(nodes))

    def _arguments_of(self, tool: ToolSpec, name: str) -> Node:
        where = f"tools.{tool.name}.parameters"
        parameters = arguments_schema(tool.parameters, where)
        document = Document(json.loads(json_text(parameters, where)))
        schema = read_schema(document.root, where, strict=bool(tool.strict), root=document)
        if self.syntax.arguments == "json":
            self.schemas.append((name, schema))
            self.checks.append(Check(tool=tool.name, schema=schema, parts=(name,)))
            return Json(name)
        self.checks.append(Check(tool=tool.name, schema=schema))
        if isinstance(self.syntax.arguments, Tagged):
            tagged = TaggedArguments(
                self.syntax.arguments, name, where, tool.model_copy(update={"parameters": document.root}), document
            )
            node = tagged.node()
            self.rules += tagged.rules
            self.schemas += tagged.schemas
            return node
        escaped = EscapedJson(name, json.loads(schema.exact), quoted=not string_is_open(self.syntax))
        node = escaped.node()
        self.rules += escaped.rules
        return node


def _cut(parts: tuple[Part, ...], said: str) -> tuple[Part, ...]:
    """`parts` without `said`, which they begin with."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    head = joined[0]
    if not isinstance(head, str) or not head.startswith(said):
        raise UnsupportedFeatureError("tools", "the chat template's calls do not begin with their trigger")
    return (head[len(said) :], *joined[1:])


def _id_pattern(after: Part) -> str:
    """Letters, digits and what else ids have, but not what may stand behind them."""
    stop = after[:1] if isinstance(after, str) else ""
    allowed = "".join(char for char in "_.:-" if char != stop)
    return f"[A-Za-z0-9{re.escape(allowed)}]{{1,64}}"
