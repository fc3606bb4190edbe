"""ChatTemplate: messages to prompt text by the model's own Jinja template.

Templates come inside model files from strangers, so they run in a sandbox (`sandbox.py`), over fresh plain data.

Templates are choosy. When one refuses the messages, or drops one of them without a word, the
`_ADAPTATIONS` are tried in their order: what is changed is a visible rule and is logged, once per template.
What is in the prompt is seen by rendering a second time with a unique word for each content; that
rendering also tells where the contents stand, and gives error messages that hold no content.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from typing import Any, TypeAlias

import jinja2

from llama_worker._chat.sandbox import ENVIRONMENT
from llama_worker._chat.segments import Span, find_contents
from llama_worker._errors import InvalidRequestError, TemplateError
from llama_worker._requests import Message

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

Turn: TypeAlias = dict[str, Any]
"""A message as templates see it: role, content and, if given, name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered chat. `spans[i]` is where the content of message i stands in `text` (start, stop): verbatim,
    perhaps without blanks at its ends; None where that is not certain."""

    text: str
    spans: tuple[Span | None, ...]


class ChatTemplate:
    """One model's chat template, compiled once. Any thread may use it; rendering blocks for its duration.

    `bos_text` and `eos_text` are what the template gets as `bos_token` and `eos_token`. `digest` identifies
    the source. Raises TemplateError for a source that does not compile.
    """

    def __init__(self, source: str, *, bos_text: str, eos_text: str) -> None:
        self.source = source
        self.digest = blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self._given = {"bos_token": bos_text, "eos_token": eos_text, "tools": None, "documents": None}
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
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, today: date, **variables: Any
    ) -> Layout:
        """The prompt for `messages`, and where in it each content stands.

        `today` is what `strftime_now` formats. `variables` are further names that the template may use
        (`enable_thinking`, …): plain data. Deterministic in its arguments; reads no clock.

        Raises InvalidRequestError for no messages or a variable that is no plain data; TemplateError when
        no adaptation makes the template render every message, with its reason but no content.
        """
        if not messages:
            raise InvalidRequestError("messages", (), "a chat needs at least one message")
        given = {**self._given, **variables, "add_generation_prompt": add_generation_prompt}
        attempt = _Attempt(self, messages, given, today)
        reason, tried = "", []
        for rule, adapt in _ADAPTATIONS:
            turns = adapt(attempt.turns)
            if turns in tried:
                continue
            tried.append(turns)
            outcome = attempt(turns, adapt(attempt.probes))
            if isinstance(outcome, Layout):
                self._log_once(rule, messages)
                return outcome
            reason = reason or outcome
        roles = ", ".join(message.role for message in messages[:20])
        raise TemplateError(f"the model's chat template refused {len(messages)} messages ({roles}): {reason}")

    def _log_once(self, rule: str, messages: Sequence[Message]) -> None:
        if rule and rule not in self._logged:
            self._logged.add(rule)
            roles = ", ".join(message.role for message in messages[:20])
            _log.warning("chat template %s does not take the roles %s: %s", self.digest[:12], roles, rule)

    def _run(self, turns: list[Turn], given: Mapping[str, Any], today: date) -> str:
        """One rendering over data that the template may change. Raises _Refusal for whatever goes wrong."""
        data = {name: _plain(value, name) for name, value in given.items()}
        messages = [dict(turn) for turn in turns]
        try:
            return _joined(
                self._template.generate(data, messages=messages, strftime_now=lambda form: today.strftime(form))
            )
        except jinja2.TemplateError as exc:
            raise _Refusal(str(exc)) from exc
        except Exception as exc:  # template code can raise anything
            raise _Refusal(f"{type(exc).__name__}: {exc}") from exc


class _Refusal(Exception):
    """Why the template did not render. Its text, and its cause, may hold contents."""


class _Attempt:
    """Renders one chat, as it is or adapted, and judges the result."""

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], given: Mapping[str, Any], today: date
    ) -> None:
        self._template, self._given, self._today = template, given, today
        self._contents = [message.content for message in messages]
        self._roles = [message.role for message in messages]
        # A template cannot contain its own digest, so these words stand nowhere else. Blank contents stay:
        # templates ask whether there is any.
        self._words = [f"c{template.digest}n{i}e" if text.strip() else "" for i, text in enumerate(self._contents)]
        self.turns = [_turn(message, message.content) for message in messages]
        self.probes = [
            _turn(message, word or message.content) for message, word in zip(messages, self._words, strict=True)
        ]

    def __call__(self, turns: list[Turn], probes: list[Turn]) -> Layout | str:
        """The layout of `turns`, or the reason why it cannot be used. `probes` are `turns` without text."""
        text, skeleton = self._text_or_none(turns), self._skeleton(probes)
        if text is None:
            return skeleton.reason or "it renders these roles, but not these contents"
        if skeleton.text is None:
            return Layout(text, (None,) * len(self._words))
        dropped = [role for role, word in zip(self._roles, self._words, strict=True) if word not in skeleton.text]
        if dropped:
            return f"it drops messages of role {', '.join(sorted(set(dropped)))}"
        return Layout(text, find_contents(text, skeleton.text, self._words, self._contents))

    def _text_or_none(self, turns: list[Turn]) -> str | None:
        try:
            return self._template._run(turns, self._given, self._today)
        except _Refusal:
            return None

    def _skeleton(self, probes: list[Turn]) -> _Skeleton:
        try:
            return _Skeleton(self._template._run(probes, self._given, self._today), "")
        except _Refusal as refusal:
            reason = str(refusal)
            for word in self._words:
                reason = reason.replace(word, "<content>") if word else reason
            return _Skeleton(None, reason[:_MAX_REASON])


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """A rendering with a word for each content, or why there is none."""

    text: str | None
    reason: str


def _turn(message: Message, content: str) -> Turn:
    turn: Turn = {"role": message.role, "content": content}
    return turn if message.name is None else {**turn, "name": message.name}


def merge_runs(turns: list[Turn]) -> list[Turn]:
    """Consecutive messages of one role become one, contents joined by an empty line."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = _joined_turn(merged[-1], turn)
        else:
            merged.append(turn)
    return merged


def fold_system(turns: list[Turn]) -> list[Turn]:
    """Each system message is put before the next user message's content; the last ones, with no user
    message behind them, become user messages."""
    folded: list[Turn] = []
    waiting: list[Turn] = []
    for turn in turns:
        if turn["role"] == "system":
            waiting.append({**turn, "role": "user"})
        elif turn["role"] == "user" and waiting:
            folded.append(merge_runs([*waiting, turn])[0])
            waiting = []
        else:
            folded.append(turn)
    return folded + merge_runs(waiting)


def _joined_turn(first: Turn, second: Turn) -> Turn:
    turn: Turn = {"role": first["role"], "content": f"{first['content']}\n\n{second['content']}"}
    name = second.get("name")
    return {**turn, "name": name} if name is not None and first.get("name", name) == name else turn


_MERGE = "consecutive messages of one role are merged"
_FOLD = "the system message is put into the user message that follows"
# The smallest change first.
_ADAPTATIONS: tuple[tuple[str, Callable[[list[Turn]], list[Turn]]], ...] = (
    ("", list),
    (_MERGE, merge_runs),
    (_FOLD, fold_system),
    (f"{_FOLD}, and {_MERGE}", lambda turns: merge_runs(fold_system(turns))),
)


def _compile(source: str) -> jinja2.Template:
    try:
        return ENVIRONMENT.from_string(source)
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
            raise jinja2.TemplateError(f"it renders more than {MAX_OUTPUT} characters")
        parts.append(piece)
    return "".join(parts)


def _plain(value: Any, field: str) -> Any:
    """A deep copy that holds nothing but plain data. Raises InvalidRequestError for anything else."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray():
            pass  # a sequence, but of numbers
        case Mapping():
            return {str(key): _plain(item, field) for key, item in value.items()}
        case Sequence():
            return [_plain(item, field) for item in value]
    raise InvalidRequestError(field, type(value).__name__, "a template variable must be plain data, as in JSON")
