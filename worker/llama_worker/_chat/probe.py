"""Probe: small chats that differ in one thing, rendered by the template that is looked at.

The names, ids and values in them are unique words, so what stands between the words is the template's syntax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llama_worker._chat.marks import border_before, common_prefix, whole_prefix, whole_suffix
from llama_worker._chat.template import ChatTemplate
from llama_worker._chat.turns import Tool, Turn
from llama_worker._errors import TemplateError

NAMES = ("qxfun", "qxgun")
IDS = ("qxid00001", "qxid00002")  # nine letters and digits, as Mistral's templates demand
KEYS = ("qxk1", "qxk2")
# The quote shows whether strings are escaped. String and number change places in the second call.
STRINGS = ('qxv1 "w', 'qxv2 "w')
NUMBERS = (73519, 84620)
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {KEYS[0]: STRINGS[0], KEYS[1]: NUMBERS[0]},
    {KEYS[0]: NUMBERS[1], KEYS[1]: STRINGS[1]},
)
NESTED: dict[str, Any] = {KEYS[0]: {"qxk3": ["qxv3", True, None]}, KEYS[1]: None}
"""What templates write in ways of their own, rather than as JSON."""
CONTENT, THOUGHT = "qxcontent", "qxthought"
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The names under which templates look for the thoughts of past turns."""

_SWITCHES = ("enable_thinking", "thinking")
_ASKED: Turn = {"role": "user", "content": "hello"}
_SCHEMA = {
    "type": "object",
    "properties": {key: {"type": "string", "description": "a word"} for key in KEYS},
    "required": list(KEYS),
}
TOOLS: list[Tool] = [
    {"type": "function", "function": {"name": name, "description": "a tool", "parameters": _SCHEMA}} for name in NAMES
]
# Tokens at which generation ends, so that they are never part of a reply's text.
_TURN_ENDS = ("<|eom_id|>", "<|call|>", "<|calls|>", "<|tool_response>")


class Probe:
    """What `template` renders for the small chats, each rendered once, when it is asked for; "" where it refuses."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._rendered: dict[str, str] = {}
        self.source = template.source

    @cached_property
    def prompt(self) -> str:
        """Ends where the reply begins."""
        return self._render([], add_generation_prompt=True)

    @cached_property
    def content(self) -> str:
        """A reply of text."""
        return self._render([{"content": CONTENT}])

    @cached_property
    def added_for_reply(self) -> str:
        """What the prompt has and the chat without a prompt for a reply has not."""
        chat = self._render([])
        return self.prompt.removeprefix(chat) if self.prompt.startswith(chat) else ""

    @cached_property
    def switch(self) -> str | None:
        """The variable with which the prompt asks for thoughts, or for none."""
        return next((name for name in _SWITCHES if name in self.source and self._switches(name)), None)

    def _switches(self, name: str) -> bool:
        with_it, without = (self._render([], [], add_generation_prompt=True, given={name: on}) for on in (True, False))
        return with_it != without

    @cached_property
    def end(self) -> str:
        """What ends a turn of text."""
        return self.content.rpartition(CONTENT)[2] if CONTENT in self.content else ""

    @cached_property
    def text_close(self) -> str:
        """What ends a text, and not a reply of calls."""
        called = self._render([_calling(ARGUMENTS[:1], self.arguments_as_text)])
        return self.end.removesuffix(whole_suffix(self.end, called)).strip()

    @cached_property
    def beside_calls(self) -> str:
        """A reply of text, from where it differs from a reply of calls."""
        called = self._render([_calling(ARGUMENTS[:1], self.arguments_as_text)])
        return self.content[self._border(self.content, called) :]

    @cached_property
    def _thinking(self) -> dict[str, bool]:
        """What must be given so that thoughts are written."""
        plain = self._render([{"content": CONTENT, **_THOUGHTS}])
        return {} if THOUGHT in plain or self.switch is None else {self.switch: True}

    @cached_property
    def thought(self) -> str:
        """A reply of thought and text."""
        return self._render([{"content": CONTENT, **_THOUGHTS}], given=self._thinking)

    @cached_property
    def thought_and_call(self) -> str:
        return self._render([{**_calling(ARGUMENTS[:1], self.arguments_as_text), **_THOUGHTS}], given=self._thinking)

    @cached_property
    def text_and_call(self) -> str:
        return self._render([{**_calling(ARGUMENTS[:1], self.arguments_as_text), "content": CONTENT}])

    @cached_property
    def thinking_prompt(self) -> str:
        return self._render([], add_generation_prompt=True, given=self._thinking)

    @cached_property
    def thinking_content(self) -> str:
        return self._render([{"content": CONTENT}], given=self._thinking)

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether arguments must be given as JSON text: as a mapping they raise, or come out in Python's way."""
        as_mapping = self._render([_calling(ARGUMENTS[:1], False)])
        if self._names_tool(as_mapping) and f"'{KEYS[0]}'" not in self.after_prompt(as_mapping):
            return False
        return self._names_tool(self._render([_calling(ARGUMENTS[:1], True)]))

    def replayed(self, arguments: dict[str, Any] | str) -> str:
        """A past call with these arguments, or with this text in their place."""
        return self.after_prompt(self._render([_calling([arguments], False)]))

    @cached_property
    def takes_tools(self) -> bool:
        return NAMES[0] in self.prompt

    @cached_property
    def takes_calls(self) -> bool:
        return self._names_tool(self._render([_calling(ARGUMENTS[:1], self.arguments_as_text)]))

    def calls(self, *arguments: dict[str, Any]) -> str:
        """The calls alone, of a reply that has one for each of `arguments`: no blanks around, no end of turn."""
        return _without_end(self._calls_on(arguments), self.end).strip()

    @property
    def blank_before_calls(self) -> str:
        text = self._calls_on(ARGUMENTS[:1])
        return text[: len(text) - len(text.lstrip())]

    def _calls_on(self, arguments: Sequence[dict[str, Any]]) -> str:
        """A reply of calls, from where it differs from one of text."""
        text = self._render([_calling(arguments, self.arguments_as_text)])
        return text[self._border(text, self.content) :]

    def _border(self, text: str, other: str) -> int:
        """From where `text` differs from `other`, with the whole tag or line in which it does."""
        floor = len(self.prompt) if text.startswith(self.prompt) else 0
        return border_before(text, len(common_prefix(text, other)), floor)

    def _names_tool(self, text: str) -> bool:
        return NAMES[0] in self.after_prompt(text)

    def after_prompt(self, text: str) -> str:
        """`text` from where it stops being the prompt."""
        return text[len(whole_prefix(text, self.prompt)) :]

    def _render(
        self,
        replies: Sequence[Turn],
        tools: Sequence[Tool] = TOOLS,
        *,
        add_generation_prompt: bool = False,
        given: Mapping[str, bool] | None = None,
    ) -> str:
        variables = dict(given or {})

        asked = repr((replies, len(tools), add_generation_prompt, variables))
        if asked not in self._rendered:
            turns = [_ASKED, *({"role": "assistant", **reply} for reply in replies)]
            try:
                text = self._template.try_out(
                    turns, tools=list(tools) or None, add_generation_prompt=add_generation_prompt, **variables
                )
            except TemplateError:
                text = ""
            self._rendered[asked] = text
        return self._rendered[asked]


_THOUGHTS = dict.fromkeys(THOUGHT_KEYS, THOUGHT)


def _calling(arguments: Sequence[dict[str, Any] | str], as_text: bool) -> Turn:
    calls = [
        {
            "id": id_,
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given) if as_text else given},
        }
        for name, id_, given in zip(NAMES, IDS, arguments, strict=False)
    ]
    return {"content": "", "tool_calls": calls}


def _without_end(text: str, end: str) -> str:
    """`text` up to the end of its turn, which may come twice, or in another form than after a text."""
    last = max(text.rfind(word) for word in (*NAMES, *KEYS, *IDS))
    stop = text.find(end.strip(), last) if end.strip() and last >= 0 else -1
    text = text[:stop] if stop >= 0 else text.removesuffix(whole_suffix(text, end))
    for turn_end in _TURN_ENDS:
        text = text.rstrip().removesuffix(turn_end)
    return text
