"""Wording: how tools, calls and results are written into messages for templates that do not render them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_worker._chat.calls import write_arguments, write_calls, write_values
from llama_worker._chat.format import ChatFormat
from llama_worker._chat.generic import GENERIC_CALLS, describe_tools
from llama_worker._requests import ToolCall, ToolSpec


@dataclass(frozen=True, slots=True)
class Wording:
    """`tools`: the tools as a part of the system message. `calls`: the calls of a turn (in OpenAI's form) as text.
    `arguments`: those of one call, as they stand in it; `values`: each of them by itself. `result`: the result of a
    call as the message of a user."""

    tools: str
    calls: Callable[[list[dict[str, Any]]], str]
    arguments: Callable[[dict[str, Any]], str]
    values: Callable[[dict[str, Any]], dict[str, str]]
    result: Callable[[str], str]


def wording_of(format: ChatFormat | None, tools: Sequence[ToolSpec]) -> Wording:
    """Calls as `format` writes them; without one, as the Hermes models do."""
    syntax = GENERIC_CALLS if format is None or format.calls is None else format.calls

    def calls_text(calls: list[dict[str, Any]]) -> str:
        return write_calls(syntax, [ToolCall.model_validate(call) for call in calls], tools)

    known = {tool.name: tool for tool in tools}

    def arguments_text(call: dict[str, Any]) -> str:
        made = ToolCall.model_validate(call)
        return write_arguments(syntax, made.arguments, known.get(made.name))

    def values_text(call: dict[str, Any]) -> dict[str, str]:
        made = ToolCall.model_validate(call)
        return write_values(syntax, made.arguments, known.get(made.name))

    return Wording(
        tools=describe_tools(tools, syntax),
        calls=calls_text,
        arguments=arguments_text,
        values=values_text,
        result=_result_text,
    )


def _result_text(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"
