"""What is known of models that do not answer as their templates render past answers, or whose templates render none.

Data only: words by which a template is recognised, and what is other than was derived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama_worker._chat.format import CallSyntax, ChatFormat, ReasoningSyntax, Slot, Tagged, TextSyntax
from llama_worker._chat.generic import GENERIC_CALLS


@dataclass(frozen=True, slots=True)
class Entry:
    """`fields` of ChatFormat, for the templates whose source has all of `words`."""

    model: str
    words: tuple[str, ...]
    fields: Mapping[str, Any]


def with_data(derived: ChatFormat, source: str) -> ChatFormat:
    """`derived`, with what is known better of the template `source`."""
    for entry in ENTRIES:
        if all(word in source for word in entry.words):
            return replace(derived, origin="data", **entry.fields)
    return derived


# Python's calls, whose strings and numbers JSON's are: lists and objects too, true and null are understood.
_LFM2_CALLS = CallSyntax(
    call=(Slot.NAME, "(", Slot.ARGUMENTS, ")"),
    arguments=Tagged(
        key_open="", string_open="=", string_close="", value_open="=", value_close="", between=", ", json_strings=True
    ),
    section_open="<|tool_call_start|>[",
    separator=", ",
    section_close="]<|tool_call_end|>",
    trigger="<|tool_call_start|>",
)

_KIMI_K3_CALLS = CallSyntax(
    call=(
        '<|open|>call tool="',
        Slot.NAME,
        '" index="',
        Slot.INDEX,
        '"<|sep|>',
        Slot.ARGUMENTS,
        "<|close|>call<|sep|>",
    ),
    arguments=Tagged(
        key_open='<|open|>argument key="',
        string_open='" type="string"<|sep|>',
        string_close="<|close|>argument<|sep|>",
        value_open='" type="',
        type_close='"<|sep|>',
        value_close="<|close|>argument<|sep|>",
    ),
    section_open="<|open|>tools<|sep|>",
    separator="",
    section_close="<|close|>tools<|sep|>",
    trigger="<|open|>tools<|sep|>",
)

ENTRIES: tuple[Entry, ...] = (
    # The template writes the recipient before the channel, the model after it.
    Entry(
        "gpt-oss (harmony)",
        ("<|channel|>", "commentary", "functions."),
        {
            "calls": CallSyntax(
                call=(
                    "<|channel|>commentary to=functions.",
                    Slot.NAME,
                    " <|constrain|>json<|message|>",
                    Slot.ARGUMENTS,
                ),
                trigger="<|channel|>commentary to=functions.",
            ),
            "text": TextSyntax(open="<|channel|>final<|message|>"),
        },
    ),
    # LFM2 renders no calls; LFM2.5-8B renders strings as they are between single quotes, which no string with a
    # quote survives: so its calls are written as text, in the form in which the model is held to write them.
    Entry("LFM2", ("List of tools: <|tool_list_start|>[",), {"calls": _LFM2_CALLS}),
    Entry("LFM2.5", ("List of tools: [", "keep_past_thinking"), {"calls": _LFM2_CALLS}),
    Entry("LFM2.5", ("List of tools: [", "<|tool_call_start|>["), {"calls": _LFM2_CALLS, "takes_calls": False}),
    # Renders neither tools nor calls, but the model has learnt Hermes' form.
    Entry("SmolLM3", ("named SmolLM", "Reasoning Mode: "), {"calls": GENERIC_CALLS}),
    Entry(
        "granite-3.3",
        ("respond only with <|tool_call|> followed by a JSON list",),
        {
            "calls": CallSyntax(
                call=('{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}"),
                section_open="<|tool_call|>[",
                separator=", ",
                section_close="]",
                trigger="<|tool_call|>",
            ),
            "reasoning": ReasoningSyntax(open="<think>", close="</think>"),
            "text": TextSyntax(open="<response>", close="</response>"),
        },
    ),
    # It renders an empty text before calls, which would be taken for a part of them.
    Entry(
        "Kimi-K3",
        ("open_tag('response')", "open_tag('tools')"),
        {
            "calls": _KIMI_K3_CALLS,
            "reasoning": ReasoningSyntax(open="<|open|>think<|sep|>", close="<|close|>think<|sep|>"),
            "text": TextSyntax(open="<|open|>response<|sep|>", close="<|close|>response<|sep|>"),
        },
    ),
    # Strings with `<`, `&` or line breaks are rendered as CDATA, others bare. All may be CDATA, and then each can be
    # read back.
    Entry(
        "MiniCPM5",
        ('<function name="', "<![CDATA["),
        {
            "calls": CallSyntax(
                call=('<function name="', Slot.NAME, '">', Slot.ARGUMENTS, "</function>"),
                arguments=Tagged(
                    key_open='<param name="',
                    string_open='"><![CDATA[',
                    string_close="]]></param>",
                    value_open='">',
                    value_close="</param>",
                ),
                separator="\n",
                trigger='<function name="',
            ),
            "takes_calls": False,
        },
    ),
)
"""The first that applies counts. Llama-3.x, functionary-3.2 and all others answer as their templates render."""
