"""Tools between LangChain and the worker: what may be called, what must be, what the text must be. All pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, cast

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, RootModel
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import is_typeddict

from llama_worker import InvalidRequestError, ResponseFormat, ToolChoice, ToolName, ToolSpec

_FORMS = "give a BaseTool, a function, a pydantic class, a TypedDict, or a dict of OpenAI's form"
# What LangChain and pydantic raise for what has no schema; a RecursionError is a RuntimeError.
_UNUSABLE = (ValueError, TypeError, KeyError, RuntimeError)
_SCHEMAS = "give a pydantic class, a TypedDict, a JSON schema or a tool of OpenAI's form"
_CLASSES = "it has no fields of its own; give a pydantic class or a TypedDict that has them, or a JSON schema"
_BASES = (BaseModel, BaseModelV1, RootModel)
# Under these names stand schemas by names that users chose, or values that are no schemas.
_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_VALUES = frozenset({"const", "enum", "default", "example", "examples"})


def openai_tool(tool: Any, *, strict: bool | None = None, where: str = "tools") -> dict[str, Any]:
    """Any of LangChain's forms of a tool in OpenAI's. Raises InvalidRequestError for what is none, naming `where`.

    Unlike LangChain's own conversion it keeps a schema that refers to itself: LangChain leaves such places open.
    Where a pydantic class makes the arguments, doubled members of a set are for it to drop.
    """
    _check_class(tool, where)
    if isinstance(tool, ToolSpec):
        tool = {"type": "function", "function": tool.model_dump(exclude_none=True)}
    try:
        converted, own = convert_to_openai_tool(tool, strict=strict), _own_schema(tool)
        whole = {"parameters": _unfolded(own)} if own is not None and _is_recursive(own) else {}
    except _UNUSABLE as exc:
        raise InvalidRequestError(where, type(tool).__name__, _FORMS) from exc
    function = converted.get("function") or {key: value for key, value in converted.items() if key != "type"}
    if converted.get("type") != "function" or "name" not in function:
        raise InvalidRequestError(where, converted.get("type"), f"not a function that runs here; {_FORMS}")
    asked = {} if strict is None else {"strict": strict}
    described = {**function, **whole, **asked}
    if "parameters" in described and is_model(tool.args_schema if isinstance(tool, BaseTool) else tool):
        described["parameters"] = _with_doubles(described["parameters"])
    return {"type": "function", "function": described}


def is_model(cls: Any) -> bool:
    """Is it a class of either pydantic, which validates what it is made of."""
    return isinstance(cls, type) and is_basemodel_subclass(cls)


def _check_class(cls: Any, where: str) -> None:
    """Refuse a class without fields: what LangChain makes of its constructor means nothing."""
    if isinstance(cls, type) and (cls in _BASES or not (is_model(cls) or is_typeddict(cls) or is_dataclass(cls))):
        raise InvalidRequestError(where, cls.__name__, _CLASSES)


def _with_doubles(schema: Any) -> Any:
    """The same without `uniqueItems`. No grammar can hold it, and the class of a set drops what is there twice."""
    if isinstance(schema, list):
        return [_with_doubles(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {key: _part_with_doubles(key, part) for key, part in schema.items() if key != "uniqueItems"}


def _part_with_doubles(key: str, part: Any) -> Any:
    if key in _VALUES:
        return part
    if key in _BY_NAME and isinstance(part, Mapping):
        return {name: _with_doubles(inner) for name, inner in part.items()}
    return _with_doubles(part)


def _own_schema(tool: Any) -> dict[str, Any] | None:
    """The JSON schema that a tool has by itself."""
    schema: Any = tool.tool_call_schema if isinstance(tool, BaseTool) else tool
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        schema = schema.model_json_schema()
    return schema if isinstance(schema, dict) and {"properties", "$ref"} & set(schema) else None


def _unfolded(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, but an object at the root: templates look for its properties there."""
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    root = schema.get("$defs", {}).get(name)
    return schema if root is None else {**root, **{key: value for key, value in schema.items() if key != "$ref"}}


def _is_recursive(schema: Mapping[str, Any]) -> bool:
    definitions = {f"#/{key}/{name}": d for key in ("$defs", "definitions") for name, d in schema.get(key, {}).items()}
    refers = {name: set(_references(definition)) for name, definition in definitions.items()}
    reached = set(refers)
    while reached:  # take away what refers to nothing that is left: a circle stays
        ends = {name for name in reached if not refers[name] & reached}
        if not ends:
            return True
        reached -= ends
    return "#" in _references(schema)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def core_tools(tools: Iterable[Any] | None, *, strict: bool | None = None) -> tuple[ToolSpec, ...]:
    """Tools as the worker takes them. Raises InvalidRequestError."""
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable | None):
        raise InvalidRequestError("tools", type(tools).__name__, "give a list of tools")
    return tuple(_core_tool(openai_tool(tool, strict=strict), index) for index, tool in enumerate(tools or ()))


def _core_tool(tool: Mapping[str, Any], index: int) -> ToolSpec:
    try:
        return ToolSpec.model_validate(tool)
    except InvalidRequestError as error:
        raise error.within(f"tools.{index}") from None


def core_choice(choice: object) -> ToolChoice | None:
    """A tool_choice in any of the known forms; None if it leaves it to the model's own default.

    None and False say nothing. "any" and True are "required". Another text is the name of a tool, and so is what
    a dict of OpenAI's or Anthropic's form names. Raises InvalidRequestError.
    """
    match choice:
        case None | False:
            return None
        case True | "any" | "required":
            return "required"
        case "auto" | "none":
            return cast("ToolChoice", choice)
        case str() as name:
            return ToolName(name=name)
        case ToolName():
            return choice
        case {"function": {"name": str() as name}} | {"name": str() as name}:
            return ToolName(name=name)
        case {"type": "auto" | "none" | "any" | "required" as kind}:
            return core_choice(kind)
    raise InvalidRequestError("tool_choice", choice, "it is auto, none, any, required, a bool, or names a tool")


def core_format(wanted: Any, *, strict: bool | None = None) -> ResponseFormat | None:
    """A response_format in OpenAI's form, a ResponseFormat, or a class whose objects are wanted; None for any text."""
    if wanted is None or (isinstance(wanted, Mapping) and wanted.get("type") == "text"):
        return None
    if isinstance(wanted, ResponseFormat):
        return wanted
    if isinstance(wanted, type):
        return ResponseFormat(type="json_schema", json_schema=json_schema(wanted, "response_format"), strict=strict)
    if not isinstance(wanted, Mapping):
        raise InvalidRequestError("response_format", type(wanted).__name__, "give a dict of OpenAI's form, or a class")
    try:
        return ResponseFormat.model_validate({**wanted, **({} if strict is None else {"strict": strict})})
    except InvalidRequestError as error:
        raise error.within("response_format") from None


def json_schema(schema: Any, where: str = "schema") -> dict[str, Any]:
    """The JSON schema of what LangChain takes for one, with its definitions. Raises InvalidRequestError of `where`.

    That of a pydantic class allows doubled members of a set, for the class to drop.
    """
    if isinstance(schema, Mapping):
        return dict(_inner_schema(schema))
    _check_class(schema, where)
    try:
        if is_model(schema):
            return cast("dict[str, Any]", _with_doubles(_class_schema(schema)))
        return convert_to_json_schema(schema)
    except _UNUSABLE as exc:
        raise InvalidRequestError(where, type(schema).__name__, _SCHEMAS) from exc


def _class_schema(cls: Any) -> dict[str, Any]:
    """Of a class of either pydantic."""
    return cast("dict[str, Any]", cls.model_json_schema() if issubclass(cls, BaseModel) else cls.schema())


def _inner_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A JSON schema is its own; tools of OpenAI's or Anthropic's form and response formats have one inside."""
    for outer in ("function", "json_schema"):
        if isinstance(schema.get(outer), Mapping):
            return _inner_schema(schema[outer])
    for inner in ("parameters", "input_schema", "schema"):
        if "name" in schema and isinstance(schema.get(inner), Mapping):
            return cast("Mapping[str, Any]", schema[inner])
    return schema


def schema_name(schema: Any) -> str:
    """What a schema is called, for it to be a tool."""
    if not isinstance(schema, Mapping):
        return str(getattr(schema, "__name__", None) or getattr(schema, "name", "answer"))
    inner = next((schema[key] for key in ("function", "json_schema") if isinstance(schema.get(key), Mapping)), schema)
    return str(inner.get("name") or inner.get("title") or "answer")


def schema_tool(schema: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """A tool whose arguments are what `schema` describes."""
    if isinstance(schema, Mapping):
        parameters = json_schema(schema)
        told = {"name": schema_name(schema), "description": str(parameters.get("description", ""))}
        schema = {**told, "parameters": parameters}
    return openai_tool(schema, strict=strict, where="schema")
