"""Attempt: renders one chat, as it is or adapted, and judges whether all of it is there.

What is in the prompt is seen by rendering the chat a second time, with a unique word for each text that comes from a
message. That rendering also gives error messages that hold no content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from llama_worker._chat.adaptations import Chat
from llama_worker._chat.fuel import fuelled
from llama_worker._chat.plain import plain
from llama_worker._chat.rules import RULES, Dropped, Plan, Rule, Search, apply
from llama_worker._chat.turns import Tool, Turn, calls, turns_of
from llama_worker._chat.wording import Wording
from llama_worker._requests import Message

_MAX_REASON = 300
_TURN = 1000  # characters: what one turn is counted as, beside its content
_MORE = 5  # times that, for changed chats: honest templates look through all turns at each, and some renderings share


class Refusal(Exception):
    """Why the template did not render. Its text, and its cause, may hold contents."""


class Exhausted(Exception):
    """The template does or makes too much, whatever is changed about the chat. Its text holds no content."""


Run: TypeAlias = Callable[[Chat], str]
"""Renders a chat, within `fuelled`. Raises Refusal or Exhausted."""


def size_of(chat: Chat, functions: str) -> int:
    """The characters that a template is given. `functions`: the tools as JSON."""
    return len(functions) + sum(len(turn["content"]) + _TURN for turn in chat.turns)


class _Words:
    """Unique words that stand for texts. Blank texts stay: templates ask whether there is any."""

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self.words: list[str] = []

    def __call__(self, text: str) -> str:
        word = f"{self._stem}{len(self.words)}e" if text.strip() else ""
        self.words.append(word)
        return word or text


class Attempt:
    """One chat, to be rendered by `run`. `stem` is a word that the template cannot contain: its digest."""

    def __init__(
        self, messages: Sequence[Message], tools: list[Tool] | None, *, stem: str, run: Run, wording: Wording
    ) -> None:
        self._run, self._wording, self._stem = run, wording, stem
        self._roles = [message.role for message in messages]
        self._contents, self._inner = _Words(f"c{stem}n"), _Words(f"c{stem}i")
        self._chat = Chat(turns_of(messages), tools)
        self._probe = Chat(turns_of(messages, content=self._contents, inner=self._inner), tools)
        # The words in each call; none where the arguments hold no text.
        every = set(self._inner.words) - {""}
        made = [call["function"] for turn in self._probe.turns for call in calls(turn)]
        self._called = [[text for text in _texts(call["arguments"]) if text in every] for call in made]

    def adapted(self, known: Plan) -> tuple[Plan, str] | Dropped | str:
        """The rendering after a small change that works, beside what is `known` to be needed. Else why there is none:
        what is wrong with the chat as it is. All that is tried after that has one tank. Raises Exhausted."""
        base = {rule for rule in known if apply((rule,), self._chat, self._wording) is not None}
        first: Dropped | str = ""
        search = Search(self._chat, without=base)
        with ExitStack() as shared:
            for plan, chat, probe in self._changed(search, base):
                text, wrong = self._tried_after(first, chat, probe)
                if text is not None:
                    return plan, text
                search.failed(wrong)
                if not first:
                    first = wrong
                    shared.enter_context(fuelled(self._size()))
        return first

    def _changed(self, search: Search, base: set[Rule]) -> Iterator[tuple[Plan, Chat, Chat]]:
        """What `search` wants tried: the chat and its probe, changed by the rules of `base`, too."""
        for plan in search:
            whole = tuple(rule for rule in RULES if rule in base.union(plan))
            chat, probe = apply(whole, self._chat, self._wording), apply(whole, self._probe, self._wording)
            if chat is not None and probe is not None:  # else a smaller plan does the same
                yield whole, chat, probe

    def _tried_after(self, first: Dropped | str, chat: Chat, probe: Chat) -> tuple[str | None, Dropped | str]:
        """As `_tried`. When the fuel is used up, what was wrong `first` is told, too."""
        try:
            return self._tried(chat, probe)
        except Exhausted as exc:
            if not first:
                raise
            raise Exhausted(f"{first}; while a change was looked for that helps, {exc}") from None

    def _size(self) -> int:
        functions = json.dumps(plain(self._chat.tools, "tools"), ensure_ascii=False)
        return size_of(self._chat, functions) + _MORE * _TURN * len(self._chat.turns)

    def _tried(self, chat: Chat, probe: Chat) -> tuple[str | None, Dropped | str]:
        """The rendering of `chat`, or None and what is wrong with it."""
        skeleton, wrong = self._skeleton(probe)
        if skeleton is not None:
            dropped = self._dropped(skeleton, probe)
            if dropped:
                return None, Dropped(frozenset(dropped))
            wrong = "it renders these roles, but not these contents"
        # Without a skeleton: the words may be what it refuses.
        return self._text_or_none(chat), wrong

    def _text_or_none(self, chat: Chat) -> str | None:
        try:
            return self._run(chat)
        except Refusal:
            return None

    def _skeleton(self, probe: Chat) -> tuple[str | None, str]:
        """The rendering with a word for each text, or None and the reason, which holds no content."""
        try:
            return self._run(probe), ""
        except Refusal as refusal:
            reason = str(refusal)
        for word in filter(None, self._contents.words + self._inner.words):
            reason = reason.replace(word, "<content>")
        for tool in probe.tools or ():
            description = tool["function"]["description"]
            reason = reason.replace(description, "<description>") if len(description) > 3 else reason
        return None, reason[:_MAX_REASON]

    def _dropped(self, skeleton: str, probe: Chat) -> set[str]:
        """What of the chat is not in its rendering."""
        contents = zip(self._roles, self._contents.words, strict=True)
        dropped: set[str] = {role for role, word in contents if word not in skeleton}
        if any(word not in skeleton for words in self._called for word in words) or (
            not all(self._called) and self._drops_names(probe)
        ):
            dropped.add("calls")
        if probe.tools and self._drops_tools(skeleton, probe):
            dropped.add("tools")
        return dropped

    def _drops_names(self, probe: Chat) -> bool:
        """Whether a call is not rendered, seen by its name. For calls whose arguments hold no text."""
        words = _Words(f"c{self._stem}f")
        turns = [_renamed(turn, words) for turn in probe.turns]
        named = [call["function"]["name"] for turn in turns for call in calls(turn)]
        text = self._text_or_none(Chat(turns, probe.tools))
        return text is not None and any(name not in text for name in named)

    def _drops_tools(self, skeleton: str, probe: Chat) -> bool:
        """Whether the tools are not rendered: the same is written without them, or one of their names is missing."""
        names = [tool["function"]["name"] for tool in probe.tools or ()]
        if any(not any(form in skeleton for form in _forms(name)) for name in names):
            return True
        return self._text_or_none(Chat(probe.turns)) == skeleton


def _forms(name: str) -> tuple[str, ...]:
    """A name as it stands in a text or in JSON."""
    return name, json.dumps(name, ensure_ascii=False)[1:-1], json.dumps(name)[1:-1]


def _texts(value: Any) -> Iterator[str]:
    """The texts in the arguments of a call."""
    match value:
        case str():
            yield value
        case dict():
            for item in value.values():
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


def _renamed(turn: Turn, word: Callable[[str], str]) -> Turn:
    if not calls(turn):
        return turn
    renamed = [
        {**call, "function": {**call["function"], "name": word(call["function"]["name"])}} for call in calls(turn)
    ]
    return {**turn, "tool_calls": renamed}
