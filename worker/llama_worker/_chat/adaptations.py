"""Adaptations: how a chat may be changed for a template that refuses it, or drops something of it.

Each returns a new chat; one that does not apply returns an equal one. `rules.py` says when they are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeAlias

from llama_worker._chat.parameters import types_of
from llama_worker._chat.turns import Tool, Turn, calls, with_arguments_as_text
from llama_worker._chat.wording import Wording

_ID_SIZE = 9

_Change: TypeAlias = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""Changes one schema; the second is the one in which it stands."""


@dataclass(frozen=True, slots=True)
class Chat:
    """What a template is given. `tools` None: none."""

    turns: list[Turn]
    tools: list[Tool] | None = None


# -- tools


def describe_tools(chat: Chat, wording: Wording) -> Chat:
    """The tools are described at the beginning of the system message; the template gets none."""
    if not chat.tools:
        return chat
    text, (first, *others) = wording.tools, chat.turns
    if first["role"] == "system":
        return Chat([{**first, "content": _paragraphs(text, first["content"])}, *others])
    return Chat([{"role": "system", "content": text}, *chat.turns])


def fill_parameters(chat: Chat, wording: Wording) -> Chat:
    """Every parameter has a description and one type."""
    return _with_properties(chat, _described)


def open_objects(chat: Chat, wording: Wording) -> Chat:
    """Every parameter that is an object says that it may have any others, by a schema without a type."""
    return _with_properties(chat, _opened)


def _with_properties(chat: Chat, change: _Change) -> Chat:
    """Each schema under `properties` is changed, after those in it."""
    if not chat.tools:
        return chat
    return replace(chat, tools=[{**tool, "function": _in_function(tool["function"], change)} for tool in chat.tools])


def _in_function(function: dict[str, Any], change: _Change) -> dict[str, Any]:
    root = function["parameters"]
    return {**function, "parameters": _in_schema(root, lambda schema: change(schema, root))}


def _in_schema(schema: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    if not isinstance(schema, dict):
        return schema
    properties = schema.get("properties")
    inner = {key: _in_schema(value, change) for key, value in schema.items() if key != "properties"}
    if not isinstance(properties, dict):
        return schema | inner
    changed = {name: _in_schema({} if value is True else value, change) for name, value in properties.items()}
    changed = {name: change(value) if isinstance(value, dict) else value for name, value in changed.items()}
    return schema | inner | {"properties": changed}


def _described(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    described = {"type": _type_of(schema, root), "description": "", **schema}
    kinds = [kind for kind in _listed(described["type"]) if kind != "null"]
    return {**described, "type": kinds[0]} if kinds else described


def _opened(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    return {"additionalProperties": {"type": None}, **schema} if schema.get("type") == "object" else schema


def _type_of(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """The first type that a schema without "type" allows; what is unknown is an object."""
    for option in (*_listed(schema.get("anyOf")), *_listed(schema.get("oneOf"))):
        if isinstance(option, dict) and isinstance(option.get("type"), str) and option["type"] != "null":
            return str(option["type"])
    known = types_of(schema, root) - {"null"}
    return next(iter(known)) if len(known) == 1 else "object"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# -- calls


def text_arguments(chat: Chat, wording: Wording) -> Chat:
    return replace(chat, turns=with_arguments_as_text(chat.turns))


def text_values(chat: Chat, wording: Wording) -> Chat:
    """Each argument of past calls that the model is not held to write as a bare text is its JSON text."""
    return _with_arguments(chat, wording.values)


def text_strings(chat: Chat, wording: Wording) -> Chat:
    """As `text_values`, but what is no string stays as it is."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        values = wording.values(call)
        return {key: values[key] if isinstance(v, str) else v for key, v in call["function"]["arguments"].items()}

    return _with_arguments(chat, written)


def written_arguments(chat: Chat, wording: Wording) -> Chat:
    """The arguments of past calls are the text that the model is held to write for them."""
    return _with_arguments(chat, wording.arguments)


def _with_arguments(chat: Chat, write: Callable[[dict[str, Any]], Any]) -> Chat:
    """What `write` makes of a call stands for its arguments, where these are no text yet."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(call["function"]["arguments"], dict):
            return call
        return {**call, "function": {**call["function"], "arguments": write(call)}}

    turns = [{**turn, "tool_calls": [*map(written, calls(turn))]} if calls(turn) else turn for turn in chat.turns]
    return replace(chat, turns=turns)


def short_ids(chat: Chat, wording: Wording) -> Chat:
    """The ids of calls become nine letters and digits, the same for the same id."""
    return replace(chat, turns=[_with_short_ids(turn) for turn in chat.turns])


def _with_short_ids(turn: Turn) -> Turn:
    turn = dict(turn)
    if calls(turn):
        turn["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in calls(turn)]
    if "tool_call_id" in turn:
        turn["tool_call_id"] = _short_id(turn["tool_call_id"])
    return turn


def _short_id(call_id: str) -> str:
    if len(call_id) == _ID_SIZE and call_id.isascii() and call_id.isalnum():
        return call_id
    return blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()[:_ID_SIZE]


def text_before_calls(chat: Chat, wording: Wording) -> Chat:
    """What the model said beside its calls is a turn of its own before them."""
    return replace(chat, turns=[part for turn in chat.turns for part in _said_and_called(turn)])


def _said_and_called(turn: Turn) -> list[Turn]:
    if not calls(turn) or not turn["content"].strip():
        return [turn]
    said = {key: value for key, value in turn.items() if key != "tool_calls"}
    return [said, {"role": turn["role"], "content": "", "tool_calls": calls(turn)}]


def text_into_answer(chat: Chat, wording: Wording) -> Chat:
    """What the model said beside its calls stands before what it answered when it had their results."""
    turns = list(chat.turns)
    for i in reversed(range(len(turns))):  # so that what was said first stands first
        turn = turns[i]
        answer = _answer_to(turns, i) if calls(turn) and turn["content"].strip() else None
        if answer is not None:
            turns[answer] = {**turns[answer], "content": _paragraphs(turn["content"], turns[answer]["content"])}
            turns[i] = {**turn, "content": ""}
    return replace(chat, turns=turns)


def _answer_to(turns: list[Turn], start: int) -> int | None:
    """Where the model spoke next, before anybody but tools did, in a turn without calls."""
    for i in range(start + 1, len(turns)):
        if turns[i]["role"] not in ("tool", "assistant"):
            return None
        if turns[i]["role"] == "assistant" and not calls(turns[i]):
            return i
    return None


def one_call_a_turn(chat: Chat, wording: Wording) -> Chat:
    """Each call is a turn of its own, with its result behind it."""
    turns: list[Turn] = []
    i = 0
    while i < len(chat.turns):
        turn = chat.turns[i]
        end = i + 1
        while end < len(chat.turns) and chat.turns[end]["role"] == "tool":
            end += 1
        turns += _one_by_one(turn, chat.turns[i + 1 : end])
        i = end
    return replace(chat, turns=turns)


def _one_by_one(turn: Turn, results: list[Turn]) -> list[Turn]:
    if len(calls(turn)) < 2:
        return [turn, *results]
    turns: list[Turn] = []
    left = list(results)
    for call in calls(turn):
        turns.append({**turn, "tool_calls": [call]})
        turns += [result for result in left if result.get("tool_call_id") == call["id"]]
        left = [result for result in left if result.get("tool_call_id") != call["id"]]
        turn = {"role": turn["role"], "content": ""}
    return turns + left


def calls_in_text(chat: Chat, wording: Wording) -> Chat:
    """Calls are written into the text of their turn."""
    return replace(chat, turns=[_written(turn, wording) for turn in chat.turns])


def _written(turn: Turn, wording: Wording) -> Turn:
    if not calls(turn):
        return turn
    kept = {key: value for key, value in turn.items() if key != "tool_calls"}
    said = turn["content"]
    text = wording.calls(calls(turn))
    return {**kept, "content": f"{said}\n{text}" if said.strip() else text}


def results_from_user(chat: Chat, wording: Wording) -> Chat:
    """The results of calls are messages of the user."""
    return replace(
        chat,
        turns=[
            {"role": "user", "content": wording.result(turn["content"])} if turn["role"] == "tool" else turn
            for turn in chat.turns
        ],
    )


# -- roles


def merge_runs(turns: list[Turn]) -> list[Turn]:
    """Consecutive messages of one role become one, contents joined by an empty line. Results stay apart."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"] != "tool":
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


def fold_later_system(turns: list[Turn]) -> list[Turn]:
    """As `fold_system`, but the system messages with which the chat begins stay."""
    first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[:first] + fold_system(turns[first:])


def _joined_turn(first: Turn, second: Turn) -> Turn:
    turn: Turn = {"role": first["role"], "content": _paragraphs(first["content"], second["content"])}
    name = second.get("name")
    if name is not None and first.get("name", name) == name:
        turn["name"] = name
    for key in (*first, *second):
        if key not in ("role", "content", "name", "tool_calls"):
            turn[key] = second.get(key, first.get(key))
    both = calls(first) + calls(second)
    return {**turn, "tool_calls": both} if both else turn


def _paragraphs(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if first and second else first + second
