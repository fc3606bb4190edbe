"""Rules: which adaptations there are, in words, and the search for the smallest that make a template render a chat."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeAlias

from llama_worker._chat.adaptations import (
    Chat,
    calls_in_text,
    describe_tools,
    fill_parameters,
    fold_later_system,
    fold_system,
    merge_runs,
    one_call_a_turn,
    open_objects,
    results_from_user,
    short_ids,
    text_arguments,
    text_before_calls,
    text_into_answer,
    text_strings,
    text_values,
    written_arguments,
)
from llama_worker._chat.format import ChatFormat, Tagged
from llama_worker._chat.turns import Turn, calls
from llama_worker._chat.wording import Wording

_MOST_RULES = 6
_MOST_TRIES, _FEWEST_TRIES = 400, 40
_SHORT = 50  # turns; each try with a longer chat takes longer
_VALUES = 50  # in tools and arguments: copied for each try, they take as long as a turn
_NO_USE = 10

Change: TypeAlias = Callable[[Chat, Wording], Chat]


@dataclass(frozen=True, slots=True)
class Rule:
    """One change, in words for the log.

    `weight`: how much it changes. `needs`: the chat must have one of these for it to change anything. `mends`:
    when these are dropped, it may help. `searched`: it is tried where others do not help; else only where the format
    says that it is needed.
    """

    words: str
    change: Change
    weight: int
    needs: str = ""
    mends: str = ""
    searched: bool = True


Plan: TypeAlias = tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a rendering cannot be used: parts of the chat are not in it. Roles, "calls" or "tools"."""

    parts: frozenset[str]

    def __str__(self) -> str:
        return f"it drops {', '.join(_DROPPED.get(part, f'messages of role {part}') for part in sorted(self.parts))}"


_DROPPED = {"calls": "calls of tools", "tools": "the tools"}


def apply(plan: Plan, chat: Chat, wording: Wording) -> Chat | None:
    """`chat` changed by all rules of `plan` in turn. None if one of them changes nothing: a smaller plan does it."""
    for rule in plan:
        changed = rule.change(chat, wording)
        if changed == chat:
            return None
        chat = changed
    return chat


class Search:
    """Which plan to try next: `for plan in search`, and tell it by `failed` why that one cannot be used.

    Best first by weight; what did not change the reason is no more than a late try. Bounded.
    """

    def __init__(self, chat: Chat, without: Container[Rule] = ()) -> None:
        has = set(_has(chat))
        rules = [(i, rule) for i, rule in enumerate(RULES) if rule.searched and rule not in without]
        needed = [(i, set(rule.needs.split())) for i, rule in rules]
        self._rules = [i for i, needs in needed if not needs or needs & has]
        self._seen: set[tuple[int, ...]] = set()
        self._most_tries = max(_FEWEST_TRIES, _MOST_TRIES * _SHORT // max(_SHORT, _length(chat)))
        self._count = count()
        self._open: list[tuple[int, int, tuple[int, ...], str]] = [(0, 0, (), "")]
        self._tried: tuple[int, tuple[int, ...], str] = (0, (), "")

    def __iter__(self) -> Iterator[Plan]:
        while self._open and len(self._seen) < self._most_tries:
            weight, _, chosen, reason = heappop(self._open)
            if chosen in self._seen:
                continue
            self._seen.add(chosen)
            self._tried = weight, chosen, reason
            yield tuple(RULES[i] for i in chosen)

    def failed(self, outcome: Dropped | str) -> None:
        """The last plan did not do: by what `outcome` says, some rule has to be added."""
        weight, chosen, reason = self._tried
        weight += _NO_USE if str(outcome) == reason else 0
        if len(chosen) >= _MOST_RULES:
            return
        for i in self._rules:
            wider = tuple(sorted({*chosen, i}))
            if wider not in self._seen and _may_mend(RULES[i], outcome):
                heappush(self._open, (weight + RULES[i].weight, next(self._count), wider, str(outcome)))


def _may_mend(rule: Rule, outcome: Dropped | str) -> bool:
    return isinstance(outcome, str) or bool(outcome.parts & set(rule.mends.split()))


def _length(chat: Chat) -> int:
    """How long copying `chat` takes, in turns."""
    data = [chat.tools, [calls(turn) for turn in chat.turns]]
    return len(chat.turns) + sum(1 for _ in _values(data)) // _VALUES


def _values(data: Any) -> Iterator[Any]:
    """All values in plain data."""
    nested = [data]
    while nested:
        value = nested.pop()
        yield value
        if isinstance(value, dict | list | tuple):
            nested += value.values() if isinstance(value, dict) else value


def _has(chat: Chat) -> Iterator[str]:
    if chat.tools:
        yield "tools"
    yield from ({"system", "tool"} & {turn["role"] for turn in chat.turns})
    if any(calls(turn) for turn in chat.turns):
        yield "calls"


def _of_turns(change: Callable[[list[Turn]], list[Turn]]) -> Change:
    return lambda chat, wording: replace(chat, turns=change(chat.turns))


_DESCRIBE = Rule(
    "the tools are described in the system message", describe_tools, weight=12, needs="tools", mends="tools"
)
_TEXT_ARGUMENTS = Rule(
    "the arguments of calls are given as text", text_arguments, weight=2, needs="calls", mends="calls"
)
_TEXT_VALUES = Rule(
    "in the arguments of calls, what is no text is given as JSON text", text_values, weight=2, needs="calls"
)
_TEXT_STRINGS = Rule(
    "in the arguments of calls, strings where other values may be are given as JSON text",
    text_strings,
    weight=1,
    needs="calls",
    searched=False,
)
_WRITTEN_ARGUMENTS = Rule(
    "the arguments of calls are given as the text that the model writes",
    written_arguments,
    weight=2,
    needs="calls",
    searched=False,
)
_ONE_CALL = Rule(
    "each call is a message of its own, with its result behind it",
    one_call_a_turn,
    weight=3,
    needs="calls",
    mends="calls tool",
)
_CALLS_IN_TEXT = Rule("calls are written as text", calls_in_text, weight=7, needs="calls", mends="calls assistant")
_RESULTS_FROM_USER = Rule(
    "the results of calls become user messages", results_from_user, weight=6, needs="tool", mends="tool"
)

# In the order in which they are applied.
RULES = (
    _DESCRIBE,
    Rule("parameters without one type or a description get one", fill_parameters, weight=1, needs="tools"),
    Rule("parameters that are objects say that they may have any others", open_objects, weight=1, needs="tools"),
    _TEXT_ARGUMENTS,
    _TEXT_VALUES,
    _TEXT_STRINGS,
    _WRITTEN_ARGUMENTS,
    Rule("the ids of calls are rewritten as nine letters and digits", short_ids, weight=1, needs="calls tool"),
    Rule(
        "what was said beside a call is put before the answer that follows",
        text_into_answer,
        weight=3,
        needs="calls",
        mends="calls assistant",
    ),
    Rule(
        "what was said beside a call is a message of its own",
        text_before_calls,
        weight=2,
        needs="calls",
        mends="calls assistant",
    ),
    _ONE_CALL,
    _CALLS_IN_TEXT,
    _RESULTS_FROM_USER,
    Rule(
        "later system messages are put into the user message that follows",
        _of_turns(fold_later_system),
        weight=3,
        needs="system",
        mends="system",
    ),
    Rule(
        "the system message is put into the user message that follows",
        _of_turns(fold_system),
        weight=4,
        needs="system tools",
        mends="system tools",
    ),
    Rule("consecutive messages of one role are merged", _of_turns(merge_runs), weight=2, mends="system user assistant"),
)


def _strings_are_bare(format: ChatFormat) -> bool:
    """Whether the template writes strings among the arguments as they are, and all else as JSON."""
    tags = format.calls.arguments if format.calls else None
    return isinstance(tags, Tagged) and tags.is_bare and not (format.values_as_text or format.arguments_as_written)


def known_rules(format: ChatFormat | None) -> Plan:
    """What is known to be needed before anything was tried."""
    if format is None:
        return ()
    needed = {
        _DESCRIBE: not format.takes_tools,
        _TEXT_ARGUMENTS: format.arguments_as_text and format.takes_calls,
        _TEXT_VALUES: format.values_as_text and format.takes_calls,
        _TEXT_STRINGS: _strings_are_bare(format) and format.takes_calls,
        _WRITTEN_ARGUMENTS: format.arguments_as_written and format.takes_calls,
        _ONE_CALL: format.takes_calls and format.calls is not None and format.calls.separator is None,
        _CALLS_IN_TEXT: not format.takes_calls,
        # A model that was not taught to call tools knows no role for their results either.
        _RESULTS_FROM_USER: format.origin == "generic",
    }
    return tuple(rule for rule, is_needed in needed.items() if is_needed)
