"""ChatTemplate: messages and tools to prompt text by the model's own Jinja template.

Templates come inside model files from strangers, so they run in a sandbox (`sandbox.py`), over fresh plain data.

Templates are choosy. When one refuses the messages, or drops one of them, a call or the tools without a word,
the rules of `rules.py` are tried, the smallest change first: what is changed is logged, once per template.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from typing import Any

import jinja2

from llama_worker._chat.adaptations import Chat
from llama_worker._chat.attempt import Attempt, Exhausted, Refusal, size_of
from llama_worker._chat.format import ChatFormat
from llama_worker._chat.fuel import OutOfFuel, fuelled, make, scan
from llama_worker._chat.plain import plain
from llama_worker._chat.rules import known_rules
from llama_worker._chat.sandbox import compiled
from llama_worker._chat.turns import Tool, Turn, tools_of
from llama_worker._chat.wording import wording_of
from llama_worker._errors import InvalidRequestError, TemplateError
from llama_worker._requests import Message, ToolSpec

__all__ = ["CHATML", "MAX_OUTPUT", "ChatTemplate", "Layout", "Turn"]

_log = logging.getLogger("llama_worker")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For models that bring no template. Whoever falls back to it says so in the log."""

MAX_OUTPUT = 16 * 2**20
"""Characters that a rendering may have."""

_MAX_REASON = 300
_SOME_DAY = date(2026, 1, 31)


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered chat. `changes`: what had to be changed about it, in words."""

    text: str
    changes: tuple[str, ...] = ()


class ChatTemplate:
    """One model's chat template, compiled once. Any thread may use it; rendering blocks for its duration.

    `bos_text` and `eos_text` are what the template gets as `bos_token` and `eos_token`. `digest` identifies
    the source. Raises TemplateError for a source that does not compile.
    """

    def __init__(self, source: str, *, bos_text: str, eos_text: str) -> None:
        self.source = source
        self.digest = blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self._given = {"bos_token": bos_text, "eos_token": eos_text, "documents": None}
        self._template = _compile(source)
        self._logged: set[str] = set()

    def __repr__(self) -> str:
        return f"<ChatTemplate {self.digest[:12]}, {len(self.source)} characters>"

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, today: date, **variables: Any
    ) -> str:
        """The prompt for `messages`. As `lay_out`, the text alone."""
        return self.lay_out(messages, add_generation_prompt=add_generation_prompt, today=today, **variables).text

    def lay_out(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSpec] = (),
        format: ChatFormat | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        today: date,
        **variables: Any,
    ) -> Layout:
        """The prompt for `messages` and `tools`.

        `format` is what is known about this template: it saves trying, and says how what the template does not
        render is written as text. `enable_thinking` None: the template is not told. `today` is what
        `strftime_now` formats. `variables` are further names that the template may use: plain data.
        Deterministic in its arguments; reads no clock. Bounded: each rendering of the messages as they are has a
        tank of fuel, and all renderings of changed ones together have one.

        Raises InvalidRequestError for no messages, or data that is not plain; TemplateError when no adaptation
        makes the template render every message, call and tool, with its reason but no content.
        """
        if not messages:
            raise InvalidRequestError("messages", (), "a chat needs at least one message")
        given = {name: plain(value, name) for name, value in variables.items()}
        given |= self._thinking(enable_thinking, format)
        given["add_generation_prompt"] = add_generation_prompt
        attempt = Attempt(
            messages,
            tools_of(tools) or None,
            stem=self.digest,
            run=lambda chat: self._run(chat, given, today),
            wording=wording_of(format, tools),
        )
        known = known_rules(format)
        try:
            outcome = attempt.adapted(known)
        except Exhausted as exc:
            outcome = str(exc)
        if not isinstance(outcome, tuple):
            what = f"{len(messages)} messages ({_roles(messages)})"
            raise TemplateError(f"the model's chat template refused {what}: {outcome}")
        plan, text = outcome
        layout = Layout(text, tuple(rule.words for rule in plan))
        self._log_once(layout.changes, messages, logging.INFO if set(plan) <= set(known) else logging.WARNING)
        return layout

    def try_out(
        self, turns: list[Turn], *, tools: list[Tool] | None = None, add_generation_prompt: bool = False, **given: Any
    ) -> str:
        """What the template makes of `turns` as they are: no adaptation, always the same day.

        For the analysis of a template. Raises TemplateError with the template's reason.
        """
        try:
            return self._run(Chat(turns, tools), {**given, "add_generation_prompt": add_generation_prompt}, _SOME_DAY)
        except (Refusal, Exhausted) as refusal:
            reason = str(refusal)[:_MAX_REASON]
        raise TemplateError(f"the chat template refused: {reason}")

    def _thinking(self, wanted: bool | None, format: ChatFormat | None) -> dict[str, bool]:
        """The variable that turns thoughts on or off, if there is something to say."""
        if wanted is None:
            return {}
        switch = format.thinking_switch if format is not None else None
        return {"enable_thinking": wanted} | ({switch: wanted} if switch else {})

    def _log_once(self, changes: tuple[str, ...], messages: Sequence[Message], level: int) -> None:
        rules = ", and ".join(changes)
        if rules and rules not in self._logged:
            self._logged.add(rules)
            _log.log(level, "for chat template %s (roles: %s): %s", self.digest[:12], _roles(messages), rules)

    def _run(self, chat: Chat, given: Mapping[str, Any], today: date) -> str:
        """One rendering over data that the template may change. Raises Refusal or Exhausted for whatever goes wrong."""
        tools = plain(chat.tools, "tools")
        functions = json.dumps(tools, ensure_ascii=False)
        data = {
            **self._given,
            "tools": tools,
            "functions": functions,  # what firefunction asks for, as
            "datetime": today.strftime("%d %b %Y"),
            **{name: plain(value, name) for name, value in given.items()},
            "messages": plain(chat.turns, "messages"),
            "strftime_now": today.strftime,
        }
        size = size_of(chat, functions)
        try:
            with fuelled(size):
                scan(size)  # what it is given is copied and written as JSON
                return _joined(self._template.generate(data))
        except OutOfFuel as exc:
            raise Exhausted(str(exc)) from None
        except jinja2.TemplateError as exc:
            raise Refusal(str(exc)) from exc
        except Exception as exc:  # template code can raise anything
            raise Refusal(f"{type(exc).__name__}: {exc}") from exc


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.role for message in messages[:20])


def _compile(source: str) -> jinja2.Template:
    try:
        return compiled(source)
    except jinja2.TemplateSyntaxError as exc:
        reason = f"line {exc.lineno}: {exc.message}"
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, TypeError) as exc:
        reason = f"{type(exc).__name__}: {exc}"
    raise TemplateError(f"the model's chat template does not compile: {reason[:_MAX_REASON]}")


def _joined(pieces: Iterable[str]) -> str:
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_OUTPUT:
            raise OutOfFuel(f"it renders more than {MAX_OUTPUT} characters")
        make(len(piece))
        parts.append(piece)
    return "".join(parts)
