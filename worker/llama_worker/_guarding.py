"""Guarding a conversation: every text in it that may be from users is kept from becoming control tokens.

Not only contents: names, thoughts, the arguments of past calls, what tools say of themselves and the variables of
the template (documents, for example) stand in the prompt too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from llama_worker._chat.plain import plain
from llama_worker._chat.schema_order import in_order
from llama_worker._requests import Message, ToolCall, ToolSpec

Protect: TypeAlias = Callable[[str], str]


def guarded_message(message: Message, protect: Protect) -> Message:
    """`message` with every text in it protected."""
    update: dict[str, Any] = {"content": protect(message.content)}
    for field in ("name", "reasoning", "tool_call_id"):
        if getattr(message, field):
            update[field] = protect(getattr(message, field))
    if message.tool_calls:
        update["tool_calls"] = tuple(_guarded_call(call, protect) for call in message.tool_calls)
    return message.model_copy(update=update)


def guarded_tool(tool: ToolSpec, protect: Protect) -> ToolSpec:
    """`tool` with every text in it protected, its schema in one order of keys.

    Its name, too: the marks do not change how it is written.
    """
    update = {
        "name": protect(tool.name),
        "description": protect(tool.description),
        "parameters": _guarded(in_order(plain(tool.parameters, "tools")), protect),
    }
    return tool.model_copy(update=update)


def _guarded_call(call: ToolCall, protect: Protect) -> ToolCall:
    update = {
        "id": protect(call.id),
        "name": protect(call.name),
        "arguments": guarded_data(call.arguments, protect, "messages"),
    }
    return call.model_copy(update=update)


def guarded_variables(variables: Mapping[str, Any], protect: Protect) -> dict[str, Any]:
    """The template's variables with every text in them protected; their names stay. A switch (True, "high") does not
    change: it holds no control text. Raises InvalidRequestError for a value that is not plain data."""
    names = plain([*variables], "template_variables")
    return {name: guarded_data(variables[name], protect, f"template_variables.{name}") for name in names}


def texts_in(value: object) -> Iterator[str]:
    """Every text in plain data, messages and tools, keys too: what may stand in a prompt and is not the template's."""
    left = [value]
    while left:
        match left.pop():
            case str() as text:
                yield text
            case Mapping() as mapping:
                left += (*mapping, *mapping.values())
            case Message() | ToolCall() | ToolSpec() as settings:
                left += (value for _, value in settings)
            case list() | tuple() as values:
                left += values


def guarded_data(value: Any, protect: Protect, field: str) -> Any:
    """A copy of plain data with every text in it protected. Raises InvalidRequestError(field) for other data."""
    return _guarded(plain(value, field), protect)


def _guarded(value: Any, protect: Protect) -> Any:
    """Plain data with every string in it protected, keys too."""
    match value:
        case str():
            return protect(value)
        case dict():
            return {_guarded(key, protect): _guarded(item, protect) for key, item in value.items()}
        case list() | tuple():
            return [_guarded(item, protect) for item in value]
        case _:
            return value
