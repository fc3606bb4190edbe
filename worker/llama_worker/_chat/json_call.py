"""JsonCall: a call that is a JSON object whole, and where in it name, arguments and id stand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from llama_worker._chat.format import CallSyntax, Part, Slot

_WORDS = {Slot.NAME: "\ue000name", Slot.ID: "\ue000id", Slot.INDEX: "\ue000id", Slot.ARGUMENTS: '"\ue000arguments"'}
_SLOTS = {"\ue000name": Slot.NAME, "\ue000id": Slot.ID, "\ue000arguments": Slot.ARGUMENTS}
_PATH = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_DECODER = json.JSONDecoder()

Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JsonCall:
    """`before` and `after` stand around the object; `paths` say by which keys each slot is reached, in its order."""

    before: str
    after: str
    paths: tuple[tuple[Slot, Path], ...]
    in_array: bool

    def transform(self, root: str) -> dict[str, Any]:
        """The call in OpenAI's form, each value named by its path behind `root`, in the object's order."""
        written: dict[str, Any] = {}
        for slot, path in self.paths:
            place = f"{{{root}{'.'.join(path)}}}"
            if slot is Slot.ID:
                written["id"] = place
            else:
                written.setdefault("function", {})[slot.value] = place
        return {"type": "function", **written}


def json_call(syntax: CallSyntax) -> JsonCall | None:
    """The call of `syntax` as an object; None if it is none, or if its name is a key."""
    text = "".join(part if isinstance(part, str) else _WORDS[part] for part in syntax.call)
    start = text.find("{")
    try:
        value, stop = _DECODER.raw_decode(text, max(start, 0))
    except ValueError:
        return None
    paths = tuple((_SLOTS[word], path) for word, path in _leaves(value) if word in _SLOTS)
    if {slot for slot, _ in paths} < {Slot.NAME, Slot.ARGUMENTS}:
        return None
    return JsonCall(text[:start], text[stop:], paths, _is_array(syntax) and start == 0 and stop == len(text))


def _is_array(syntax: CallSyntax) -> bool:
    around = syntax.section_open.rstrip().endswith("["), syntax.section_close.lstrip().startswith("]")
    return all(around) and (syntax.separator or "").strip() == ","


def _leaves(value: object, path: Path = ()) -> Iterator[tuple[str, Path]]:
    if isinstance(value, str):
        yield value, path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _leaves(inner, (*path, key))


def json_parts(transform: Mapping[str, Any], root: str) -> tuple[list[Part], list[Part]]:
    """What stands before and behind the arguments in the object that `transform` takes apart. Raises ValueError."""
    found: dict[str, Any] = {}
    for slot, path in _places(transform, root):
        inner = found
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key!r} cannot be both a value and an object")
        inner[path[-1]] = f"\ue000{slot.value}"
    text = json.dumps(found, ensure_ascii=False).replace('"\ue000arguments"', "\ue000arguments")
    before, there, after = text.partition("\ue000arguments")
    if not there or "\ue000name" not in text:
        raise ValueError("it does not say which keys are the name and the arguments")
    return list(_split(before)), list(_split(after))


def _places(transform: Mapping[str, Any], root: str) -> Iterator[tuple[Slot, Path]]:
    for key, value in transform.items():
        if key == "id":
            yield Slot.ID, _path(value, root)
        elif key == "function" and value == f"{{{root}}}":
            yield from ((Slot.NAME, ("name",)), (Slot.ARGUMENTS, ("arguments",)))
        elif key == "function" and isinstance(value, Mapping):
            for name, place in value.items():
                yield Slot(name), _path(place, root)


def _path(place: object, root: str) -> Path:
    found = _PATH.fullmatch(place) if isinstance(place, str) else None
    path = tuple(found[1].split(".")) if found else ()
    if not found or (root and path[:1] != (root,)):
        raise ValueError(f"{place!r} is no key of the object")
    return path[1:] if root else path


def _split(text: str) -> Iterator[Part]:
    for piece in re.split("(\ue000name|\ue000id)", text):
        if piece:
            yield _SLOTS.get(piece, piece)
