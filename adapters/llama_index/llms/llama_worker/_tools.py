"""Tools between LlamaIndex and the worker: what may be called, what must be, and what was. All pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.function_tool import FunctionTool
from llama_index.core.tools.types import BaseTool, ToolMetadata
from llama_index.llms.llama_worker._schemas import demanded
from pydantic import BaseModel
from pydantic_core import from_json

from llama_worker import InvalidRequestError, ToolCall, ToolChoice, ToolName

_Told: TypeAlias = tuple[str, str, Mapping[str, Any] | str]
"""Id, which may be "", name and arguments of a call."""
_FORMS = "give a BaseTool, a function, a ToolSpec, or a dict of OpenAI's form"
_RUN_HERE = "it is called here; give a BaseTool or a function"
# What LlamaIndex and pydantic raise for a function that they cannot describe; a RecursionError is a RuntimeError.
_UNUSABLE = (ValueError, TypeError, AttributeError, KeyError, RuntimeError)


def openai_tool(tool: BaseTool) -> dict[str, Any]:
    """A tool as OpenAI describes it, under its own name: LlamaIndex's form has another one for `my.tool`.

    Raises InvalidRequestError if it has none, or if its arguments cannot be described.
    """
    name = tool.metadata.name
    if not name:
        raise InvalidRequestError("tools", name, "a tool has no name; give it one")
    try:
        described: dict[str, Any] = tool.metadata.to_openai_tool(skip_length_check=True)
        parameters = _parameters(tool.metadata, described["function"]["parameters"])
    except _UNUSABLE as exc:
        raise InvalidRequestError("tools", name, "its arguments have no JSON schema; give it an fn_schema") from exc
    return {**described, "function": {**described["function"], "name": name, "parameters": parameters}}


def _parameters(metadata: ToolMetadata, told: dict[str, Any]) -> dict[str, Any]:
    """`told`, but no more than the class of the arguments demands, where it is that class that tells them."""
    if metadata.fn_schema is None or type(metadata).get_parameters_dict is not ToolMetadata.get_parameters_dict:
        return told
    schema = demanded(metadata.fn_schema)
    return {key: schema[key] for key in told}


def core_tools(tools: object) -> list[Any]:
    """What the worker takes as its tools. Raises InvalidRequestError for what is none."""
    return [
        tool if isinstance(tool, BaseModel | Mapping) else openai_tool(_tool(tool, _FORMS)) for tool in _many(tools)
    ]


def tools_to_run(tools: object) -> list[BaseTool]:
    """Tools that are called here, each function as the tool that an agent makes of it. Raises InvalidRequestError."""
    return [_tool(tool, _RUN_HERE) for tool in _many(tools)]


def _many(tools: object) -> Iterable[Any]:
    if not isinstance(tools, Iterable) or isinstance(tools, str | Mapping):
        raise InvalidRequestError("tools", type(tools).__name__, "it is a list of tools")
    return tools


def _tool(tool: Any, way_out: str) -> BaseTool:
    if isinstance(getattr(tool, "metadata", None), ToolMetadata):
        return tool  # type: ignore[no-any-return]
    if not callable(tool):
        raise InvalidRequestError("tools", type(tool).__name__, way_out)
    try:
        return FunctionTool.from_defaults(tool)
    except _UNUSABLE as exc:
        raise InvalidRequestError("tools", type(tool).__name__, f"it cannot be described; {way_out}") from exc


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
        """The call for a template to show. One that was cut off shows what was tried, so the conversation can go on.

        Raises InvalidRequestError for what no call can be.
        """
        if isinstance(self.arguments, str) and not _is_whole(self.arguments):
            return ToolCall(id=self.id, name=self.name or "unknown", arguments=_tried(self.arguments))
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
    return (_begun_object(arguments) or {}) if isinstance(arguments, str) else dict(arguments)


def _begun_object(text: str) -> dict[str, Any] | None:
    """None if it does not begin one."""
    try:
        value = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_whole(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _tried(arguments: str) -> dict[str, Any]:
    """Arguments that are no object, as one: as far as they go, or else as the text that they are."""
    begun = _begun_object(arguments)
    if begun is not None:
        return begun
    return {"arguments": arguments} if arguments.strip(' "{}[]') else {}


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
