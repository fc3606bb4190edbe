"""CallReader: the calls of a reply, from their trigger on. It awaits one part of the format after another."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from llama_worker._chat.arguments import ArgumentLine, TaggedReader, read_json, read_json_string
from llama_worker._chat.calls import name_in, string_is_open
from llama_worker._chat.format import CallSyntax, Part, Slot, Tagged
from llama_worker._chat.json_text import strict_object
from llama_worker._chat.literals import Literal, read_literal, which_comes
from llama_worker._chat.source import CutOffError, MalformedError, Reading, Source
from llama_worker._chat.words import WordEnd, read_word
from llama_worker._events import InvalidToolCall, ReplyEvent, ToolCallDelta, ToolCallEnded, ToolCallStarted
from llama_worker._requests import ToolCall, ToolSpec

_CUT = "the reply ended before the call was complete"
_PATTERNS = {Slot.ID: re.compile(r"[A-Za-z0-9_.:-]+"), Slot.INDEX: re.compile(r"[0-9]+")}


@dataclass(frozen=True, slots=True)
class CallLine:
    """The parts of a call, made ready to be awaited. Those before its first slot are in `opening` and `next`."""

    opening: Literal
    """What begins the section and its first call."""
    next: Literal | None
    """What begins any other call; None: there is none in this section."""
    close: Literal
    parts: tuple[Literal | Slot, ...]
    ends: tuple[tuple[WordEnd, ...], ...]
    """For each of `parts`: what may stand behind it."""
    arguments: ArgumentLine | None

    @classmethod
    @lru_cache(64)
    def of(cls, syntax: CallSyntax) -> CallLine:
        call = _joined(syntax.call)
        lead = call[0] if isinstance(call[0], str) else ""
        rest = call[1:] if lead else call
        separator = syntax.separator
        return cls(
            opening=Literal.of(syntax.section_open + lead),
            next=None if separator is None else Literal.of(separator + lead, after_blanks=True),
            close=Literal.of(syntax.section_close, after_blanks=True),
            parts=tuple(Literal.of(part, after_blanks=True) if isinstance(part, str) else part for part in rest),
            ends=tuple(_ends(syntax, rest[at + 1 :]) for at in range(len(rest))),
            arguments=ArgumentLine.of(syntax.arguments) if isinstance(syntax.arguments, Tagged) else None,
        )


def _joined(parts: tuple[Part, ...]) -> list[Part]:
    """No two texts beside each other, and no empty ones."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _ends(syntax: CallSyntax, rest: list[Part]) -> tuple[WordEnd, ...]:
    match rest:
        case [str(text), *_]:
            return (WordEnd.before(text),)
        case [Slot.ARGUMENTS, *more]:
            if isinstance(syntax.arguments, Tagged):
                none = _ends(syntax, list(more))
                return (WordEnd.before(syntax.arguments.key_open), *none) if syntax.arguments.key_open else none
            return (WordEnd.before("{" if syntax.arguments == "json" else '"'),)
        case _:
            return ()


@dataclass(slots=True)
class _OpenCall:
    """What is known of the call that is being read."""

    id: str = ""
    name: str = ""
    tool: ToolSpec | None = None
    announced: bool = False
    pieces: list[str] = field(default_factory=list)
    problem: str | None = None


class CallReader:
    """Reads sections of calls. For one reply and one thread at a time.

    Nothing that was not read whole, or that does not name one of `tools`, is told as a ToolCall. `new_id` gives the
    ids: those that a model writes are not unique.
    """

    __slots__ = ("_index", "_known", "_line", "_new_id", "_source", "_syntax", "_tell", "_tools")

    def __init__(
        self,
        source: Source,
        syntax: CallSyntax,
        tools: Mapping[str, ToolSpec],
        *,
        new_id: Callable[[], str],
        tell: Callable[[ReplyEvent], None],
    ) -> None:
        self._source = source
        self._syntax = syntax
        self._line = CallLine.of(syntax)
        self._tools = tools
        self._known = {name_in(syntax, name): name for name in tools} | {name: name for name in tools}
        self._new_id = new_id
        self._tell = tell
        self._index = 0

    @property
    def told(self) -> int:
        """How many calls there were."""
        return self._index

    def read(self) -> Reading[str]:
        """Read the calls, of which the trigger is there. Returns a text that turned out not to be part of a call.

        Raises CutOffError where the reply ends within the calls; the open one is told as invalid before.
        """
        opening: Literal | None = self._line.opening
        while opening is not None:
            no_call = yield from self._call(opening)
            if no_call:
                return no_call
            opening = yield from self._what_next()
        return ""

    def _call(self, opening: Literal) -> Reading[str]:
        call = _OpenCall()
        self._source.keep()
        try:
            yield from read_literal(self._source, opening, "the beginning of a call")
            yield from self._parts(call)
            self._end(call)
        except MalformedError as error:
            # Before its name is known nothing has been said of a call: then all of it is text.
            if not call.name:
                return self._source.kept() or self._source.take(1)
            call.problem = call.problem or str(error)
            self._end(call)
            return self._source.kept()
        except CutOffError:
            call.problem = call.problem or _CUT
            self._end(call)
            raise
        return ""

    def _parts(self, call: _OpenCall) -> Reading[None]:
        for at, part in enumerate(self._line.parts):
            if isinstance(part, Literal):
                yield from self._literal(call, part)
            elif part is Slot.ARGUMENTS:
                yield from self._arguments(call, at)
            else:
                yield from self._word(call, part, self._line.ends[at])

    def _literal(self, call: _OpenCall, part: Literal) -> Reading[None]:
        if not call.name:
            yield from read_literal(self._source, part, "a part of a call")
            return
        self._source.keep()
        yield from read_literal(self._source, part, "a part of the call")
        self._source.forget()

    def _word(self, call: _OpenCall, slot: Slot, ends: tuple[WordEnd, ...]) -> Reading[None]:
        if slot is Slot.NAME:
            word = yield from read_word(self._source, ends, self._known, "the tool's name")
            self._name(call, word)
            return
        word = yield from read_word(self._source, ends, (), f"the call's {slot.value}")
        if not _PATTERNS[slot].fullmatch(word):
            raise MalformedError(f"the call's {slot.value} has a character that it cannot have")

    def _name(self, call: _OpenCall, word: str) -> None:
        name = self._known.get(word, word)
        if call.name:
            call.problem = call.problem or (None if name == call.name else "the call has two names")
            return
        call.name, call.tool = name, self._tools.get(name)
        self._source.forget()
        if call.tool is None:
            call.problem = f"there is no such tool; the tools are {', '.join(self._tools)}"
            return
        self._announce(call)

    def _announce(self, call: _OpenCall) -> None:
        call.id, call.announced = self._new_id(), True
        self._tell(ToolCallStarted(index=self._index, id=call.id, name=call.name))
        if call.pieces:
            self._tell(ToolCallDelta(index=self._index, arguments="".join(call.pieces)))

    def _arguments(self, call: _OpenCall, at: int) -> Reading[None]:
        def tell(piece: str) -> None:
            call.pieces.append(piece)
            if call.announced:
                self._tell(ToolCallDelta(index=self._index, arguments=piece))

        if self._line.arguments is not None:
            after = self._line.parts[at + 1] if at + 1 < len(self._line.parts) else None
            literal = after if isinstance(after, Literal) else None
            yield from TaggedReader(self._source, tell, self._line.arguments, literal, call.tool).read()
        elif self._syntax.arguments == "json":
            yield from read_json(self._source, tell)
        else:
            yield from read_json_string(self._source, tell, is_open=string_is_open(self._syntax))

    def _end(self, call: _OpenCall) -> None:
        """Tell what became of the call. One without its own id is announced here, so that all are told alike."""
        if not call.announced:
            self._announce(call)
        text = "".join(call.pieces)
        outcome: ToolCall | InvalidToolCall
        try:
            if call.problem is not None:
                raise MalformedError(call.problem)
            outcome = ToolCall(id=call.id, name=call.name, arguments=strict_object(text))
        except MalformedError as error:
            outcome = InvalidToolCall(id=call.id, name=call.name, arguments=text, error=str(error))
        self._tell(ToolCallEnded(index=self._index, call=outcome))
        self._index += 1

    def _what_next(self) -> Reading[Literal | None]:
        """What the next call begins with. None: the section is over, and its closing text read."""
        line = self._line
        comes = [literal for literal in (line.next, line.close) if literal is not None and not literal.is_empty]
        try:
            which = (yield from which_comes(self._source, comes)) if comes else None
        except CutOffError:
            self._cut_between(self._source.take_all())
            raise
        if which is line.close:
            yield from read_literal(self._source, line.close, "the end of the calls")
            return None
        return which

    def _cut_between(self, text: str) -> None:
        """The reply ends behind a call, in what may be the next one, or only the end of the calls."""
        if text.strip() and (self._line.close.is_empty or not self._line.close.may_begin_with(text)):
            self._end(_OpenCall(problem=_CUT))
