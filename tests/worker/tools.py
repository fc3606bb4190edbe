"""Three tools for tests, a template of a model that thinks and calls, and what must hold for every reply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jsonschema_rs

from llama_worker import (
    Failed,
    Finished,
    InvalidToolCall,
    Reply,
    StreamEvent,
    ToolCall,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)
from llama_worker.testing import assert_well_formed

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["celsius", "fahrenheit", None]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
MAIL: dict[str, Any] = {
    "name": "send_mail",
    "description": "Send a mail.",
    "parameters": {
        "type": "object",
        "properties": {
            "to": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}@ex\\.org$"}, "maxItems": 3},
            "urgent": {"type": "boolean"},
            "body": {
                "type": "object",
                "properties": {"text": {"type": "string", "maxLength": 16}, 'größe "x"': {"const": 1.5}},
                "required": ["text"],
                "additionalProperties": False,
            },
        },
        "required": ["to", "urgent", "body"],
        "additionalProperties": False,
    },
}
NOW: dict[str, Any] = {"name": "now", "description": "What time it is."}
TOOLS = [WEATHER, MAIL, NOW]
SCHEMAS = {tool["name"]: tool.get("parameters", {}) for tool in TOOLS}

QWEN = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content and loop.index0 > ns.last %}<think>
{{ m.reasoning_content.strip('\n') }}
</think>

{% endif %}{{ m.content.lstrip('\n') }}
{%- for call in m.tool_calls or [] %}
{%- if not loop.first or m.content %}{{ '\n' }}{% endif %}
{%- if call.function %}{% set call = call.function %}{% endif %}<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}""".lstrip()
"""Like Qwen3's: thinks unless it is told not to, and calls tools."""

THINKER = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Like R1's: every reply begins inside a thought, and nothing turns that off."""


def assert_valid_calls(calls: Iterable[ToolCall], schemas: dict[str, Any] = SCHEMAS) -> None:
    """Declared names, arguments as their schemas want them, ids unique."""
    calls = list(calls)
    for call in calls:
        assert call.name in schemas, call.name
        schema = schemas[call.name]
        if schema:
            jsonschema_rs.validate(schema, call.arguments)
        else:
            assert call.arguments == {}
    ids = [call.id for call in calls]
    assert len(set(ids)) == len(ids)


def assert_sound(reply: Reply, schemas: dict[str, Any] = SCHEMAS) -> None:
    """Calls are valid, and a call that is none was cut off by length."""
    assert_valid_calls(reply.tool_calls, schemas)
    if reply.invalid_tool_calls:
        assert reply.finish_reason in ("length", "cancelled"), reply
        assert len(reply.invalid_tool_calls) == 1
    assert (reply.finish_reason == "tool_calls") <= bool(reply.tool_calls)
    assert (reply.finish_reason == "stop") <= (not reply.tool_calls)


def assert_sound_stream(events: Sequence[StreamEvent], schemas: dict[str, Any] = SCHEMAS) -> Finished | Failed:
    """A well-formed stream in which what is said of a call piece by piece is what is said of it at its end."""
    end = assert_well_formed(events)
    said: dict[int, str] = {}
    for event in events:
        match event:
            case ToolCallStarted(index=index):
                said[index] = ""
            case ToolCallDelta(index=index, arguments=arguments):
                said[index] += arguments
            case ToolCallEnded(index=index, call=ToolCall() as call):
                assert ToolCall(id="", name=call.name, arguments=said[index]).arguments == call.arguments
                assert_valid_calls([call], schemas)
            case ToolCallEnded(index=index, call=InvalidToolCall() as call):
                assert call.arguments == said[index]
                assert any(name.startswith(call.name) for name in schemas)  # it may be cut off
            case _:
                pass
    return end
