"""Tools for models whose template knows none: they are told of them in the system message, in plain words.

Small models read this too, so it is short; and since their calls are held to the form, one example is enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llama_worker._chat.calls import write_calls
from llama_worker._chat.format import CallSyntax, Slot
from llama_worker._requests import ToolCall, ToolSpec

GENERIC_CALLS = CallSyntax(
    call=('<tool_call>\n{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}\n</tool_call>"),
    separator="\n",
    trigger="<tool_call>",
)
"""The form that most models have seen: Hermes', which Qwen and many others took over."""

_EXAMPLE = ToolCall(id="call_1", name="tool_name", arguments={"argument": "value"})


def describe_tools(tools: Sequence[ToolSpec], calls: CallSyntax) -> str:
    """What the system message says of `tools`, and that they are called as `calls` says; "" for no tools."""
    if not tools:
        return ""
    known = "\n".join(_described(tool) for tool in tools)
    return (
        f"You can call these tools:\n<tools>\n{known}\n</tools>\n"
        f"To call a tool, answer with nothing but the call, in this form:\n{write_calls(calls, [_EXAMPLE], [])}\n"
        "Its result is given to you in the next message. Call no other tools. Where no tool helps, answer in words."
    )


def _described(tool: ToolSpec) -> str:
    parts = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return json.dumps({key: value for key, value in parts.items() if value}, ensure_ascii=False)
