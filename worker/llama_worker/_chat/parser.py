"""OutputParser: the text of a reply in, what it means out: text, thoughts and calls, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum, auto
from itertools import groupby

from llama_worker._chat.call_reader import CallReader
from llama_worker._chat.calls import beginning_of
from llama_worker._chat.format import CallSyntax, ChatFormat
from llama_worker._chat.source import BLANKS, CutOffError, Reading, Source
from llama_worker._events import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta
from llama_worker._requests import ToolSpec

_NOTHING = "\0"


class _Begins(Enum):
    """What begins behind a marker, or without one."""

    TEXT = auto()
    THOUGHT = auto()
    CALLS = auto()
    REST = auto()
    """No more text, as the format says; text is read all the same."""


class OutputParser:
    """Turns the text of one reply into events as it comes. For one reply and one thread at a time.

    However the text is cut into pieces, the events are the same when deltas beside each other are joined. Never
    raises for a text: what is no call is text, and a call that is not whole and strict JSON ends as InvalidToolCall.
    What is held back is only what may still become a tag, and the blanks beside one.

    `calls`: tools may be called, so the calls of `format` are looked for; otherwise they are text. `in_reasoning`:
    the prompt ended inside of a thought. Thoughts begin only where no text stands before them, so an answer may
    speak of the tags. `answers`: a grammar holds the text to a form (`response_format`), so there is one thought at
    most, no other blanks than two line breaks behind it, nothing behind the text, and once that has begun all is
    text. `thinks`: a thought may begin; otherwise such an answer may begin with its tag. `new_id` gives the ids of
    calls; each one must be new.
    """

    __slots__ = (
        "_answers",
        "_behind_text",
        "_blanks",
        "_calls_behind_text",
        "_calls_unmarked",
        "_close",
        "_events",
        "_first",
        "_open",
        "_plain",
        "_reader",
        "_reading",
        "_said",
        "_second",
        "_source",
        "_tagged",
        "_text_close",
        "_text_open",
        "_thinking",
        "_thinks",
        "_trigger",
        "_trigger_at_start",
    )

    def __init__(
        self,
        format: ChatFormat,
        tools: Sequence[ToolSpec],
        *,
        calls: bool,
        in_reasoning: bool,
        new_id: Callable[[], str],
        answers: bool = False,
        thinks: bool = True,
    ) -> None:
        thoughts, syntax = format.reasoning, format.calls if calls else None
        self._events: list[ReplyEvent] = []
        self._source = Source()
        self._open, self._close = (thoughts.open.strip(BLANKS), thoughts.close.strip(BLANKS)) if thoughts else ("", "")
        # A line break behind the mark is part of it: `all` alone may begin a tool's name.
        self._text_open, self._text_close = format.text.open.lstrip(BLANKS), format.text.close.strip(BLANKS)
        self._answers = answers
        self._trigger = syntax.trigger if syntax else ""
        self._trigger_at_start = syntax is not None and syntax.only_at_start
        # Nothing marks a call: what begins as nothing else is one.
        self._calls_unmarked = syntax is not None and not syntax.trigger
        # Behind a text only a given tool's name makes one: the text may speak of what stands before it.
        self._behind_text = syntax.behind_text if syntax else ""
        self._calls_behind_text = _behind_text(syntax, tools) if syntax and self._behind_text else {}
        self._reader = None if syntax is None else self._call_reader(syntax, tools, new_id)
        self._thinking = in_reasoning and bool(self._close)
        self._thinks = thinks or not answers
        self._said = False  # there was text, and not only blanks
        self._tagged = False  # there was a tag or a call
        self._blanks: list[str] = []  # held back: they are text only if text follows
        # While nothing is held back a piece without these characters needs no closer look.
        self._plain: type[TextDelta] | type[ReasoningDelta] | None = None
        self._first = self._second = _NOTHING
        self._reading = self._reply()
        next(self._reading)

    def _call_reader(self, syntax: CallSyntax, tools: Sequence[ToolSpec], new_id: Callable[[], str]) -> CallReader:
        known = {tool.name: tool for tool in tools}
        return CallReader(self._source, syntax, known, new_id=new_id, tell=self._events.append)

    @property
    def in_reasoning(self) -> bool:
        """What comes next is thought, as far as is known."""
        return self._thinking

    def feed(self, text: str) -> list[ReplyEvent]:
        """What `text` adds. Never blocks, never raises."""
        plain = self._plain
        if (
            plain is not None
            and self._first not in text
            and self._second not in text
            and text
            and (plain is TextDelta or text[-1] not in BLANKS)
        ):
            return [plain(text)]
        self._source.feed(text)
        return self._go_on()

    def flush(self) -> list[ReplyEvent]:
        """The reply is over: what was held back, and an open call as an InvalidToolCall. Feed nothing after it."""
        self._source.end()
        return self._go_on()

    def _go_on(self) -> list[ReplyEvent]:
        next(self._reading, None)
        told = list(_joined(self._events)) if len(self._events) > 1 else self._events.copy()
        self._events.clear()
        return told

    def _reply(self) -> Reading[None]:
        """The whole reply. Every reader tells what it holds back when it is cut off."""
        try:
            if self._thinking:
                yield from self._thought()
            begins = yield from self._beginning()
            while True:
                begins = yield from self._read(begins)
        except CutOffError:
            pass

    def _read(self, what: _Begins) -> Reading[_Begins]:
        """Read it up to where something else begins."""
        if what is _Begins.THOUGHT:
            yield from self._thought()
        elif what is _Begins.TEXT or (what is _Begins.CALLS and (yield from self._calls())):
            return (yield from self._text())
        return (yield from self._beginning())

    def _beginning(self) -> Reading[_Begins]:
        """Read the blanks where text could begin, and the marker behind them, if one stands there."""
        source, markers = self._source, self._markers_here()
        try:
            while True:
                self._hold(source.take_blanks())
                markers = markers if self._may_be_marked() else {}
                for marker in markers:
                    if source.starts_with(marker):
                        return self._met(marker, markers[marker])
                if not source.is_empty and not any(marker.startswith(source.peek(len(marker))) for marker in markers):
                    return _Begins.CALLS if self._calls_unmarked and not self._said else _Begins.TEXT
                yield from source.more()
        except CutOffError:
            if not source.is_empty or not (self._said or self._tagged):
                self._begin_text()
                self._tell_text(source.take_all())
            raise

    def _markers_here(self) -> dict[str, _Begins]:
        markers = {} if self._answers else {self._text_close: _Begins.REST}
        if not self._said:
            markers[self._text_open] = _Begins.TEXT
        if not self._said and self._thinks:
            markers[self._open] = _Begins.THOUGHT
        if not (self._said and (self._trigger_at_start or self._answers)):
            markers[self._trigger] = _Begins.CALLS
        if self._said and not self._answers:
            markers |= self._calls_behind_text
        return {marker: markers[marker] for marker in sorted(markers, key=len) if marker}

    def _may_be_marked(self) -> bool:
        """Whether a marker may stand behind the blanks that are held: the grammar of an answer allows only these."""
        return not (self._answers and self._blanks) or (self._tagged and "".join(self._blanks) in ("\n", "\n\n"))

    def _met(self, marker: str, what: _Begins) -> _Begins:
        """Read `marker`; but the trigger is part of the calls, and so is the name behind a text."""
        if marker in self._calls_behind_text:
            self._source.take(len(self._behind_text))
        elif what is not _Begins.CALLS:
            self._source.take(len(marker))
            self._blanks.clear()
            self._tagged = True
        return what

    def _text(self) -> Reading[_Begins]:
        """Tell text up to the next marker: the one that begins first, and of those the shortest."""
        self._begin_text()
        source = self._source
        markers = self._markers_here()
        ended = False
        while True:
            hits = [(at, len(marker), marker) for marker in markers if (at := source.find(marker)) >= 0]
            sure = source.size if ended else min(map(source.before, markers), default=source.size)
            if hits and min(hits)[0] <= sure:
                at, _, marker = min(hits)
                self._tell_text(source.take(at))
                return self._met(marker, markers[marker])
            self._tell_text(source.take(sure))
            if ended:
                raise CutOffError
            try:
                yield from self._wait(TextDelta, markers)
            except CutOffError:
                ended = True

    def _begin_text(self) -> None:
        """The blanks that were held back stand before text: they are part of it, but not between a tag and it."""
        if self._tagged and not self._said:
            self._blanks.clear()
        self._said = True

    def _hold(self, blanks: str) -> None:
        if blanks:
            self._blanks.append(blanks)

    def _held(self) -> str:
        held = "".join(self._blanks)
        self._blanks.clear()
        return held

    def _tell_text(self, text: str) -> None:
        if told := self._held() + text:
            self._events.append(TextDelta(told))

    def _thought(self) -> Reading[None]:
        """Tell thoughts up to the closing tag, which is read; without the blanks at both ends."""
        source, close, begun = self._source, self._close, False
        self._thinking = self._tagged = True
        try:
            while (length := source.find(close)) < 0:
                begun = self._tell_thought(source.take(source.before(close)), begun)
                yield from self._wait(ReasoningDelta, [close]) if begun else source.more()
        except CutOffError:
            if self._tell_thought(source.take_all(), begun) and (rest := self._held()):
                self._events.append(ReasoningDelta(rest))
            raise
        self._tell_thought(source.take(length), begun)
        self._blanks.clear()
        source.take(len(close))
        self._thinking = False
        self._thinks = not self._answers

    def _tell_thought(self, text: str, begun: bool) -> bool:
        """Tell `text` but for the blanks at its end, which are held. Whether the thought has begun now."""
        text = text if begun else text.lstrip(BLANKS)
        body = text.rstrip(BLANKS)
        if body:
            self._events.append(ReasoningDelta(self._held() + body))
        self._hold(text[len(body) :])
        return begun or bool(body)

    def _calls(self) -> Reading[bool]:
        """Read calls from the trigger on. Whether what came then is text."""
        assert self._reader is not None
        before = self._reader.told
        text = yield from self._reader.read()
        if self._reader.told > before:
            self._tagged = True
            self._blanks.clear()
        if text:
            self._begin_text()
            self._tell_text(text)
        return bool(text)

    def _wait(self, kind: type[TextDelta] | type[ReasoningDelta], markers: Iterable[str]) -> Reading[None]:
        """Wait for more. Where nothing is held back, pieces that cannot begin a marker are told without being read."""
        if self._source.is_empty and not self._blanks:
            self._plain = kind
            # There are two at most: the end of the text, and what all calls begin with.
            self._first, self._second = (*dict.fromkeys(marker[0] for marker in markers), _NOTHING, _NOTHING)[:2]
        yield from self._source.more()
        self._plain = None


def _behind_text(syntax: CallSyntax, tools: Sequence[ToolSpec]) -> dict[str, _Begins]:
    return {syntax.behind_text + beginning_of(syntax, tool.name)[0]: _Begins.CALLS for tool in tools}


def _joined(events: Iterable[ReplyEvent]) -> Iterator[ReplyEvent]:
    """Deltas beside each other as one; those of two calls never are."""
    for kind, group in groupby(events, key=type):
        if kind is TextDelta:
            yield TextDelta("".join(event.text for event in group if isinstance(event, TextDelta)))
        elif kind is ReasoningDelta:
            yield ReasoningDelta("".join(event.text for event in group if isinstance(event, ReasoningDelta)))
        elif kind is ToolCallDelta:
            deltas = [event for event in group if isinstance(event, ToolCallDelta)]
            yield ToolCallDelta(index=deltas[0].index, arguments="".join(delta.arguments for delta in deltas))
        else:
            yield from group
