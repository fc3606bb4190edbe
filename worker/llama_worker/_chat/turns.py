"""Turns: messages and tools as templates see them. Plain dicts in OpenAI's form, as Transformers passes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llama_worker._chat.plain import plain
from llama_worker._requests import Message, ToolCall, ToolSpec

Turn: TypeAlias = dict[str, Any]
"""A message: role, content (never None) and, where it has them, name, tool_calls, tool_call_id and thoughts."""
Tool: TypeAlias = dict[str, Any]
"""A tool: type "function" and the function with its name, description and parameters."""
Text: TypeAlias = Callable[[str], str]
"""What stands in a turn for a text of its message."""

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""The names by which templates ask for the thoughts of a past turn."""


def turns_of(messages: Sequence[Message], *, content: Text = str, inner: Text = str) -> list[Turn]:
    """One turn each. `content` is applied to contents, `inner` to thoughts and to the texts in arguments.

    Calls without an id get a running one. A result is told the id and the name of the call that it answers:
    by its `tool_call_id`, else the first call that is not answered yet. Raises InvalidRequestError for arguments
    that are no plain data.
    """
    turns: list[Turn] = []
    waiting: dict[str, str] = {}
    for message in messages:
        turn: Turn = {"role": message.role, "content": content(message.content)}
        if message.name is not None:
            turn["name"] = message.name
        if message.reasoning:
            turn |= dict.fromkeys(REASONING_NAMES, inner(message.reasoning))
        if message.tool_calls:
            calls = [_call(call, f"call_{len(turns)}_{i}", inner) for i, call in enumerate(message.tool_calls)]
            turn["tool_calls"] = calls
            waiting = {call["id"]: call["function"]["name"] for call in calls}
        if message.role == "tool":
            turn = {**_answer(message.tool_call_id, waiting), **turn}
        turns.append(turn)
    return turns


def _call(call: ToolCall, running_id: str, inner: Text) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _mapped(plain(call.arguments, "messages"), inner)}
    return {"id": call.id or running_id, "type": "function", "function": function}


def _mapped(value: Any, inner: Text) -> Any:
    """A copy of `value` with `inner` applied to each text in it; keys stay."""
    match value:
        case str():
            return inner(value)
        case dict():
            return {key: _mapped(item, inner) for key, item in value.items()}
        case list() | tuple():
            return [_mapped(item, inner) for item in value]
    return value


def _answer(given_id: str | None, waiting: dict[str, str]) -> dict[str, str]:
    call_id = given_id or next(iter(waiting), None)
    if call_id is None:
        return {}
    name = waiting.pop(call_id, None)
    return {"tool_call_id": call_id} | ({} if name is None else {"name": name})


def with_arguments_as_text(turns: list[Turn]) -> list[Turn]:
    """The arguments of past calls as the text of a JSON object, for templates that join them to text."""
    return [{**turn, "tool_calls": [_as_text(call) for call in calls(turn)]} if calls(turn) else turn for turn in turns]


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}


def calls(turn: Turn) -> list[dict[str, Any]]:
    """The calls of a turn, perhaps none."""
    found: list[dict[str, Any]] = turn.get("tool_calls") or []
    return found


def tools_of(tools: Sequence[ToolSpec]) -> list[Tool]:
    """Tools as dicts, in the order given. What is called without arguments takes an object without properties."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": _parameters(tool.parameters),
            },
        }
        for tool in tools
    ]


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with what every template looks for: a type and properties."""
    return {"type": "object", "properties": {}, **plain(schema, "tools")}
