"""write_calls: calls as the text that a model would write, the inverse of what the parser reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llama_worker._chat.format import CallSyntax, Part, Slot, Tagged
from llama_worker._chat.parameters import json_type, mixed_parameters, nullable_parameters, text_parameters
from llama_worker._requests import ToolCall, ToolSpec

_NO_ID = re.compile(r"[^A-Za-z0-9_.:-]")


def write_calls(syntax: CallSyntax, calls: Sequence[ToolCall], tools: Sequence[ToolSpec]) -> str:
    """The text of `calls`, with what stands before and after them; "" for none.

    `tools` say which arguments are text where that is not written in the call; a tool that is not among them
    has its strings written as text. A string that contains the text that would end it cannot be read back.
    Where the syntax knows one call a turn, several stand one after another.
    """
    known = {tool.name: tool for tool in tools}
    written = [_write(syntax, call, index, known.get(call.name)) for index, call in enumerate(calls)]
    if not written:
        return ""
    between = syntax.section_close + syntax.section_open if syntax.separator is None else syntax.separator
    return syntax.section_open + between.join(written) + syntax.section_close


def write_arguments(syntax: CallSyntax, arguments: dict[str, Any], tool: ToolSpec | None) -> str:
    """The text of the arguments of one call; `tool` as in `write_calls`, None where it is not known."""
    if isinstance(syntax.arguments, Tagged):
        return _tagged(syntax.arguments, arguments, tool)
    text = _json(arguments)
    if syntax.arguments == "json":
        return text
    return _inner(text) if string_is_open(syntax) else _json(text)


def write_values(syntax: CallSyntax, arguments: dict[str, Any], tool: ToolSpec | None) -> dict[str, str]:
    """Each argument by itself, as it stands in a call. Strings stay as they are where not the syntax says else."""
    tags = syntax.arguments

    def written(key: str, value: object) -> str:
        told = isinstance(tags, Tagged) and not tags.json_strings and not _is_text(tags, key, value, tool)
        return value if isinstance(value, str) and not told else _json(value)

    return {key: written(key, value) for key, value in arguments.items()}


def name_in(syntax: CallSyntax, name: str) -> str:
    """How `name` stands in a call: escaped, where it stands in a JSON string."""
    at = syntax.call.index(Slot.NAME)
    before = syntax.call[at - 1] if at else syntax.section_open
    return _inner(name) if isinstance(before, str) and before.endswith('"') else name


def beginning_of(syntax: CallSyntax, name: str) -> tuple[str, tuple[Part, ...]]:
    """A call of the tool `name` up to its name and the text behind that, and the parts that follow.

    For syntaxes whose calls may stand behind a text: there only texts stand before the name.
    """
    at = syntax.call.index(Slot.NAME)
    before, behind = around_name(syntax)
    return before + name_in(syntax, name) + behind, syntax.call[at + 1 + bool(behind) :]


def around_name(syntax: CallSyntax) -> tuple[str, str]:
    """What stands before the name of the first call, and behind it; for the syntaxes of `beginning_of`."""
    at = syntax.call.index(Slot.NAME)
    before = "".join(part for part in syntax.call[:at] if isinstance(part, str))
    after = syntax.call[at + 1 : at + 2]
    return syntax.section_open + before, after[0] if after and isinstance(after[0], str) else ""


def string_is_open(syntax: CallSyntax) -> bool:
    """For arguments as a "json_string": the quotes around it are written in the parts beside it, not by the slot."""
    at = syntax.call.index(Slot.ARGUMENTS)
    before = syntax.call[at - 1] if at else syntax.section_open
    return isinstance(before, str) and before.endswith('"')


def _write(syntax: CallSyntax, call: ToolCall, index: int, tool: ToolSpec | None) -> str:
    words = {
        Slot.NAME: lambda: name_in(syntax, call.name),
        Slot.ID: lambda: _NO_ID.sub("_", call.id) or f"call_{index}",
        Slot.INDEX: lambda: str(index),
        Slot.ARGUMENTS: lambda: write_arguments(syntax, call.arguments, tool),
    }
    return "".join(part if isinstance(part, str) else words[part]() for part in syntax.call)


def _tagged(syntax: Tagged, arguments: dict[str, Any], tool: ToolSpec | None) -> str:
    return syntax.between.join(
        _argument(syntax, key, value, is_text=_is_text(syntax, key, value, tool)) for key, value in arguments.items()
    )


def _is_text(syntax: Tagged, key: str, value: object, tool: ToolSpec | None) -> bool:
    """A string that the schema knows; or one that it does not know, where a string is told by how it is written."""
    if syntax.json_strings or not isinstance(value, str | None):
        return False
    if tool is None or key not in tool.parameters.get("properties", {}):
        return isinstance(value, str) and (tool is None or not syntax.opens_alike)
    if value is None:
        return syntax.opens_alike and key in nullable_parameters(tool)
    return key in (text_parameters(tool) if syntax.opens_alike else text_parameters(tool) | mixed_parameters(tool))


def _argument(syntax: Tagged, key: str, value: object, *, is_text: bool) -> str:
    again = "" if syntax.key_again is None else key + syntax.key_again
    if is_text:
        text = value if isinstance(value, str) else _json(value)
        return f"{syntax.key_open}{key}{syntax.string_open}{text}{syntax.string_close}{again}"
    kind = "" if syntax.type_close is None else json_type(value) + syntax.type_close
    return f"{syntax.key_open}{key}{syntax.value_open}{kind}{_json(value)}{syntax.value_close}{again}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _inner(text: str) -> str:
    return _json(text)[1:-1]
