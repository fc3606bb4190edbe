"""A model of paper: a chat template that knows thoughts and tools, and what a model that was trained on it writes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_index.core.tools import FunctionTool
from llama_index.llms.llama_worker import LlamaWorkerLLM
from pydantic import BaseModel, Field

from llama_worker.testing import fake_worker

TEMPLATE = r"""
{%- macro turn(role, text) -%}{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{%- endmacro -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
    {%- set about = namespace(text=system + '\n\n# Tools\n<tools>') -%}
    {%- for tool in tools -%}{%- set about.text = about.text + '\n' + (tool | tojson) -%}{%- endfor -%}
    {{- turn('system', about.text + '\n</tools>\nCall them within <tool_call></tool_call>.') -}}
{%- elif system -%}
    {{- turn('system', system) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- turn('user', '<tool_response>\n' + message.content + '\n</tool_response>') -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if message.reasoning_content -%}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}
        {%- endif -%}
        {{- message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- call.function.arguments | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif not (loop.first and message.role == 'system') -%}
        {{- turn(message.role, message.content) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""


class Song(BaseModel):
    """A song."""

    title: str = Field(max_length=24)
    year: int = Field(ge=1900, le=2030)


SONG = {"title": "Yesterday", "year": 1965}


def generate_song(title: str, year: int) -> str:
    """Generate a song."""
    return f"{title} ({year})"


def call(name: str, /, **arguments: object) -> str:
    """What the model writes to call a tool."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def thought(text: str, then: str = "") -> str:
    return f"<think>\n{text}\n</think>\n\n{then}"


SING = call("generate_song", **SONG)
SONG_TOOL = FunctionTool.from_defaults(generate_song, fn_schema=Song)


@contextmanager
def scripted(*replies: str, **fields: Any) -> Iterator[LlamaWorkerLLM]:
    """An LLM that answers with `replies` in turn. Nothing is left of one when its grammar allows nothing of it."""
    with fake_worker(*replies, chat_template=TEMPLATE, n_ctx=40_000) as worker:
        yield LlamaWorkerLLM(worker=worker, **{"max_tokens": 2_000, **fields})
