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

    `between` stands between two arguments. A string is written as it is, so it cannot contain `string_close`.
    """

    key_open: str
    string_open: str
    string_close: str
    value_open: str
    value_close: str
    between: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How the calls of one turn are written.

    `trigger` is the text from which on the model has begun to call: a beginning of the first call's text, long
    enough to be meant. With `only_at_start` it counts only where the reply begins. `arguments`: "json" an object,
    "json_string" an object as the text of a JSON string, or Tagged. `separator` None: one call a turn.
    """

    call: tuple[Part, ...]
    arguments: Literal["json", "json_string"] | Tagged = "json"
    section_open: str = ""
    separator: str | None = None
    section_close: str = ""
    trigger: str
    only_at_start: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningSyntax:
    """How thoughts are written: `open` … `close`. Blanks around the tags are not part of the thought.

    Whether a reply begins inside them is seen from its prompt, which then ends with `open`.
    """

    open: str
    close: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """What one template writes. `digest` is the template's; `origin` says where this knowledge is from.

    derived: the template was rendered and the difference read. data: an entry of format_data.py. generic: the
    template knows no tools; they are described in the system message and called as JSON.

    `calls` None: this model cannot be given tools. `takes_tools`: the template renders tools by itself.
    `arguments_as_text`: it wants the arguments of past calls as JSON text. `replays_reasoning`: it writes the
    thoughts of past turns. `thinking_switch`: the variable that turns thinking on and off, if there is one.
    """

    digest: str
    origin: Literal["derived", "data", "generic"]
    calls: CallSyntax | None = None
    reasoning: ReasoningSyntax | None = None
    takes_tools: bool = False
    arguments_as_text: bool = False
    replays_reasoning: bool = False
    thinking_switch: str | None = None
