"""Chat formats as real templates write them, by hand, and tools to call in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llama_worker._chat.format import CallSyntax, ChatFormat, ReasoningSyntax, Slot, Tagged, TextSyntax
from llama_worker._requests import ToolSpec

THINK = ReasoningSyntax(open="<think>", close="</think>")


def _tool(name: str, required: tuple[str, ...] = (), **properties: Any) -> ToolSpec:
    schema = {"type": "object", "properties": properties, "required": list(required), "$defs": {"word": STRING}}
    return ToolSpec(name=name, description="a tool", parameters=schema)


STRING: dict[str, Any] = {"type": "string"}
WEATHER = _tool("get_weather", city=STRING, days={"type": "integer"}, note={"anyOf": [STRING, {"type": "null"}]})
TRANSFER = _tool(
    "transfer",
    to={"$ref": "#/$defs/word"},
    amount={"type": "number"},
    sure={"type": "boolean"},
    tags={"type": "array", "items": STRING},
    more={"type": "object"},
)
PING = _tool("ping")
TOOLS = (WEATHER, TRANSFER, PING)

HERMES = CallSyntax(
    call=('<tool_call>\n{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}\n</tool_call>"),
    separator="\n",
    trigger="<tool_call>",
)
MISTRAL = CallSyntax(
    call=('{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, ', "id": "', Slot.ID, '"}'),
    section_open="[TOOL_CALLS][",
    separator=", ",
    section_close="]",
    trigger="[TOOL_CALLS]",
)
MISTRAL_TAGS = CallSyntax(
    call=("[TOOL_CALLS]", Slot.NAME, "[ARGS]", Slot.ARGUMENTS), separator="", trigger="[TOOL_CALLS]"
)
KIMI = CallSyntax(
    call=(
        "<|tool_call_begin|>functions.",
        Slot.NAME,
        ":",
        Slot.INDEX,
        "<|tool_call_argument_begin|>",
        Slot.ARGUMENTS,
        "<|tool_call_end|>",
    ),
    section_open="<|tool_calls_section_begin|>",
    separator="",
    section_close="<|tool_calls_section_end|>",
    trigger="<|tool_calls_section_begin|>",
)
COHERE = CallSyntax(
    call=(
        '{"tool_call_id": "',
        Slot.ID,
        '", "tool_name": "',
        Slot.NAME,
        '", "parameters": ',
        Slot.ARGUMENTS,
        "}",
    ),
    section_open="<|START_ACTION|>[\n    ",
    separator=",\n    ",
    section_close="\n]<|END_ACTION|>",
    trigger="<|START_ACTION|>",
)
QWEN_CODER = CallSyntax(
    call=("<tool_call>\n<function=", Slot.NAME, ">\n", Slot.ARGUMENTS, "</function>\n</tool_call>"),
    arguments=Tagged(
        key_open="<parameter=",
        string_open=">\n",
        string_close="\n</parameter>\n",
        value_open=">\n",
        value_close="\n</parameter>\n",
    ),
    separator="\n",
    trigger="<tool_call>",
)
GLM = CallSyntax(
    call=("<tool_call>", Slot.NAME, "\n", Slot.ARGUMENTS, "</tool_call>"),
    arguments=Tagged(
        key_open="<arg_key>",
        string_open="</arg_key>\n<arg_value>",
        string_close="</arg_value>\n",
        value_open="</arg_key>\n<arg_value>",
        value_close="</arg_value>\n",
    ),
    separator="\n",
    trigger="<tool_call>",
)
DEEPSEEK_TAGS = CallSyntax(
    call=('<｜DSML｜invoke name="', Slot.NAME, '">\n', Slot.ARGUMENTS, "\n</｜DSML｜invoke>"),
    arguments=Tagged(
        key_open='<｜DSML｜parameter name="',
        string_open='" string="true">',
        string_close="</｜DSML｜parameter>",
        value_open='" string="false">',
        value_close="</｜DSML｜parameter>",
        between="\n",
    ),
    section_open="<｜DSML｜function_calls>\n",
    separator="\n",
    section_close="\n</｜DSML｜function_calls>",
    trigger="<｜DSML｜function_calls>",
)
GEMMA = CallSyntax(
    call=("<|tool_call>call:", Slot.NAME, "{", Slot.ARGUMENTS, "}<tool_call|>"),
    arguments=Tagged(
        key_open="",
        string_open=':<|"|>',
        string_close='<|"|>',
        value_open=":",
        value_close="",
        between=",",
    ),
    separator="",
    trigger="<|tool_call>",
)
KEY_AGAIN = CallSyntax(
    call=("<call><", Slot.NAME, ">", Slot.ARGUMENTS, "</", Slot.NAME, "></call>"),
    arguments=Tagged(key_open="<", string_open=">", string_close="</", value_open=">", value_close="</", key_again=">"),
    separator="",
    trigger="<call>",
)
TYPED = CallSyntax(
    call=("<|open|>call ", Slot.NAME, "\n", Slot.ARGUMENTS, "<|close|>"),
    arguments=Tagged(
        key_open="<|key|>",
        string_open='" type="string">',
        string_close="<|end|>",
        value_open='" type="',
        value_close="<|end|>",
        type_close='">',
    ),
    trigger="<|open|>call",
)
JSON_STRINGS = CallSyntax(
    call=("<fn>", Slot.NAME, "(", Slot.ARGUMENTS, ")</fn>"),
    arguments=Tagged(
        key_open="",
        string_open="",
        string_close="",
        value_open="=",
        value_close="",
        between=", ",
        json_strings=True,
    ),
    separator="",
    trigger="<fn>",
)
LLAMA = CallSyntax(
    call=('{"name": "', Slot.NAME, '", "parameters": ', Slot.ARGUMENTS, "}"),
    trigger='{"name": "',
    only_at_start=True,
)
TEXT_ARGUMENTS = CallSyntax(
    call=('<function_call>{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}</function_call>"),
    arguments="json_string",
    separator="",
    trigger="<function_call>",
)
OPEN_TEXT_ARGUMENTS = CallSyntax(
    call=('<call>["', Slot.NAME, '", "', Slot.ARGUMENTS, '"]</call>'),
    arguments="json_string",
    separator="",
    trigger="<call>",
)
ARGUMENTS_FIRST = CallSyntax(
    call=('<tool_call>{"arguments": ', Slot.ARGUMENTS, ', "name": "', Slot.NAME, '"}</tool_call>'),
    separator=" ",
    trigger="<tool_call>",
)

UNMARKED = CallSyntax(call=(Slot.NAME, "\n", Slot.ARGUMENTS), separator=">>>", trigger="", only_at_start=True)
"""Calls begin with the tool's name and text with a marker: every reply that does not begin so is calls."""
BEHIND_TEXT = replace(UNMARKED, behind_text=">>>")
"""The same, and calls may come behind a text."""

SYNTAXES = {
    "hermes": HERMES,
    "mistral": MISTRAL,
    "mistral-tags": MISTRAL_TAGS,
    "kimi": KIMI,
    "cohere": COHERE,
    "qwen-coder": QWEN_CODER,
    "glm": GLM,
    "deepseek-tags": DEEPSEEK_TAGS,
    "gemma": GEMMA,
    "key-again": KEY_AGAIN,
    "typed": TYPED,
    "json-strings": JSON_STRINGS,
    "llama": LLAMA,
    "text-arguments": TEXT_ARGUMENTS,
    "open-text-arguments": OPEN_TEXT_ARGUMENTS,
    "arguments-first": ARGUMENTS_FIRST,
}


def format_with(
    calls: CallSyntax | None, reasoning: ReasoningSyntax | None = THINK, text: TextSyntax | None = None
) -> ChatFormat:
    return ChatFormat(digest="by hand", origin="data", calls=calls, reasoning=reasoning, text=text or TextSyntax())
