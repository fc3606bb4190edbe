"""ChatFormat: how one chat template writes thoughts and calls. One value; grammar and parser are both made of it.

A call is a line of parts: texts that stand there word for word, and slots for what varies.

    section_open  call  (separator  call)*  section_close

    <tool_call>\\n{"name": "  NAME  ", "arguments":   ARGUMENTS  }\\n</tool_call>

So the grammar is the parts one after another, and the parser waits for one part after another: a model that is
held to the one writes what the other reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias


class Slot(Enum):
    """What varies in a call."""

    NAME = "name"
    """The tool's name. It may stand twice in a call; it is the same both times."""
    ID = "id"
    """An id that the template writes: letters, digits, `_`, `-`, `.` and `:`."""
    INDEX = "index"
    """The running number of the call, in digits."""
    ARGUMENTS = "arguments"
    """The arguments, written as `CallSyntax.arguments` says."""


Part: TypeAlias = str | Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """Arguments of which each is written by itself, not as JSON.

        key_open  KEY  string_open  VALUE  string_close          where the tool's schema says that it is a string
        key_open  KEY  value_open  JSON VALUE  value_close       otherwise

    Where the schema says that it may be a string or something else, what opens it tells which it is; where strings
    and values open alike, it is JSON.

    `between` stands between two arguments. A string is written as it is, so it cannot contain `string_close`.
    `key_again`: with both closing texts the key stands once more, followed by this text: `</` KEY `>` is a
    `string_close` of `</` and a `key_again` of `>`. `type_close`: before a JSON value its JSON type is named
    (number, boolean, object, array or null) and followed by this text: value_open TYPE type_close VALUE.
    `json_strings`: strings are JSON values like all others; string_open and string_close then count for nothing.
    A string that may be null, and nothing else: where strings and values open alike, it is a string, and the bare
    text `null` is null.
    """

    key_open: str
    string_open: str
    string_close: str
    value_open: str
    value_close: str
    between: str = ""
    key_again: str | None = None
    type_close: str | None = None
    json_strings: bool = False

    @property
    def opens_alike(self) -> bool:
        """A string and a value cannot be told apart by what opens them."""
        return self.string_open == self.value_open

    @property
    def is_bare(self) -> bool:
        """Strings stand as they are, between the same as all other values."""
        return self.opens_alike and self.string_close == self.value_close and not self.json_strings


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How the calls of one turn are written.

    `trigger` is the text from which on the model has begun to call: a beginning of the first call's text, long
    enough to be meant. With `only_at_start` it counts only where the reply begins; if it is empty then, nothing
    marks a call, and a reply that begins neither with a thought nor as TextSyntax says is calls. `behind_text` is then
    what stands between a text and calls; empty: none come behind a text. `arguments`: "json"
    an object, "json_string" an object as the text of a JSON string, or Tagged. `separator` None: one call a turn.
    Neither `section_open` nor the first call begins with a blank, but where nothing marks a call: blanks before the
    section mean nothing.
    """

    call: tuple[Part, ...]
    arguments: Literal["json", "json_string"] | Tagged = "json"
    section_open: str = ""
    separator: str | None = None
    section_close: str = ""
    trigger: str
    only_at_start: bool = False
    behind_text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningSyntax:
    """How thoughts are written: `open` … `close`. Blanks around the tags are not part of the thought.

    Whether a reply begins inside them is seen from its prompt, which then ends with `open`.
    """

    open: str
    close: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSyntax:
    """What stands around the text of a reply, where it is marked: neither is text. Empty: nothing stands there.

    A reply may leave either out. Behind `close` comes no more text, only calls or the end.
    """

    open: str = ""
    close: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """What one template writes. `digest` is the template's; `origin` says where this knowledge is from.

    derived: the template was rendered and the difference read. data: an entry of format_data.py. generic: the
    template knows no tools; they are described in the system message and called as JSON.

    `calls` None: this model cannot be given tools. `takes_tools`: the template renders tools by itself; otherwise
    they are described in the system message. `takes_calls`: it renders past calls by itself; otherwise they are
    written into the content (`generic.describe_tools`, `calls.write_calls`).
    `turn_open` is what it writes before a reply, without the beginning of a thought.
    `arguments_as_text`: it wants the arguments of past calls as JSON text. `values_as_text`: it writes each argument
    by itself, and what is no string in a way of its own (`True`, `None`, an element for each value in a list) unless
    it is given as JSON text. `arguments_as_written`: it does so too, unless it is given all of them as one text, as
    the model is held to write them.
    `replays_reasoning`: it writes the thoughts of past turns. `thinking_switch`: the variable that turns thinking on
    and off, if there is one.
    """

    digest: str
    origin: Literal["derived", "data", "generic"]
    calls: CallSyntax | None = None
    reasoning: ReasoningSyntax | None = None
    text: TextSyntax = TextSyntax()
    takes_tools: bool = False
    takes_calls: bool = False
    arguments_as_text: bool = False
    values_as_text: bool = False
    arguments_as_written: bool = False
    replays_reasoning: bool = False
    thinking_switch: str | None = None
    turn_open: str = ""
