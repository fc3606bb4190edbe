"""Tools between LlamaIndex and the worker: what may be called, what must be, and what was. All pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from pydantic import BaseModel
from pydantic_core import from_json

from llama_worker import InvalidRequestError, ToolCall, ToolChoice, ToolName

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

_Told: TypeAlias = tuple[str, str, Mapping[str, Any] | str]
"""Id, which may be "", name and arguments of a call."""
_FORMS = "give a BaseTool, a ToolSpec, or a dict of OpenAI's form"


def openai_tool(tool: BaseTool) -> dict[str, Any]:
    """A tool as OpenAI describes it, under its own name: LlamaIndex's form has another one for `my.tool`.

    Raises InvalidRequestError if it has none.
    """
    if not tool.metadata.name:
        raise InvalidRequestError("tools", tool.metadata.name, "a tool has no name; give it one")
    described: dict[str, Any] = tool.metadata.to_openai_tool(skip_length_check=True)
    return {**described, "function": {**described["function"], "name": tool.metadata.get_name()}}


def core_tools(tools: object) -> list[Any]:
    """What the worker takes as its tools. Raises InvalidRequestError for what is none."""
    if not isinstance(tools, Iterable) or isinstance(tools, str | Mapping):
        raise InvalidRequestError("tools", type(tools).__name__, "it is a list of tools")
    return [_core_tool(tool) for tool in tools]


def _core_tool(tool: Any) -> Any:
    if isinstance(tool, BaseModel | Mapping):
        return tool
    if not hasattr(tool, "metadata"):
        raise InvalidRequestError("tools", type(tool).__name__, _FORMS)
    return openai_tool(tool)


def core_choice(choice: object) -> ToolChoice:
    """A tool_choice in any of the frameworks' forms. None means auto, "any" required, another text a tool's name."""
    match choice:
        case None | "auto":
            return "auto"
        case "any" | "required":
            return "required"
        case "none":
            return "none"
        case str() as name:
            return ToolName(name=name)
        case ToolName():
            return choice
        case Mapping():
            return ToolName.model_validate(dict(choice))
    raise InvalidRequestError("tool_choice", choice, "it is auto, none, required, any, or names a tool")


def wanted_choice(choice: object, *, required: bool) -> str | dict[str, Any]:
    """`tool_choice` and `tool_required` of LlamaIndex as one tool_choice, in OpenAI's form."""
    wanted = core_choice(choice)
    if required and wanted == "none":
        raise InvalidRequestError("tool_choice", "none", "tool_required=True wants a call; leave one of them out")
    if isinstance(wanted, ToolName):
        return {"type": "function", "function": {"name": wanted.name}}
    return "required" if required else wanted


@dataclass(frozen=True, slots=True)
class Called:
    """A call as a message of LlamaIndex tells it. `arguments` may be the beginning of a JSON text."""

    id: str
    name: str
    arguments: Mapping[str, Any] | str

    @property
    def selection(self) -> ToolSelection:
        return ToolSelection(tool_id=self.id, tool_name=self.name, tool_kwargs=_begun(self.arguments))

    @property
    def core(self) -> ToolCall:
        """Raises InvalidRequestError if its arguments are not whole."""
        return ToolCall.model_validate({"id": self.id, "name": self.name, "arguments": self.arguments})


def calls_of(message: ChatMessage) -> list[Called]:
    """The calls of a message: its blocks, then what only `additional_kwargs` tells.

    Those are the calls of other integrations, and of our streams the one that is still being written. A call
    without an id gets one from its place, the same each time.
    """
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    told: list[_Told] = [(block.tool_call_id or "", block.tool_name, block.tool_kwargs) for block in blocks]
    ids = {call_id for call_id, _, _ in told}
    entries = [_told(entry) for entry in _entries(message)]
    told += [entry for entry in entries if not told or entry[0] not in {*ids, ""}]
    return [Called(call_id or f"call_{i}", name, arguments) for i, (call_id, name, arguments) in enumerate(told)]


def _entries(message: ChatMessage) -> Sequence[Any]:
    entries = message.additional_kwargs.get("tool_calls") or ()
    return entries if isinstance(entries, Sequence) and not isinstance(entries, str) else ()


def _told(entry: Any) -> _Told:
    """One entry of `tool_calls`: OpenAI's dict or object, or a ToolSelection, which may have been to JSON and back."""
    plain = entry.model_dump() if isinstance(entry, BaseModel) else entry
    if isinstance(plain, Mapping):
        function = plain.get("function") or plain
        name = function.get("name") or function.get("tool_name")
        arguments = function.get("arguments") or function.get("tool_kwargs") or {}
        if isinstance(name, str) and isinstance(arguments, Mapping | str):
            return str(plain.get("id") or plain.get("tool_id") or ""), name, arguments
    raise InvalidRequestError("tool_calls", type(entry).__name__, "each is a dict of OpenAI's form, or a ToolSelection")


def _begun(arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    """Arguments as far as they are written."""
    if not isinstance(arguments, str):
        return dict(arguments)
    try:
        value = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def openai_call(call_id: str, name: str, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    """A call as an entry of `additional_kwargs["tool_calls"]`: plain JSON, for workflows save their messages."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def only_first_call(message: ChatMessage) -> ChatMessage:
    """The message with no more than one call. Another object, if anything is left out."""
    calls = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    entries = _entries(message)
    if max(len(calls), len(entries)) <= 1:
        return message
    blocks = [block for block in message.blocks if block not in calls[1:]]
    kwargs = {**message.additional_kwargs, **({"tool_calls": list(entries[:1])} if entries else {})}
    return message.model_copy(update={"blocks": blocks, "additional_kwargs": kwargs})
