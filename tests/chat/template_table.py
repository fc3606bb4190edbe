"""What becomes of tools and calls with each template that llama.cpp ships: `python -m tests.chat.template_table`
writes docs/templates.md. Everything in the table is computed.

For each template: a conversation with tools is rendered; past calls, as the template renders them, are parsed back;
they are fed byte by byte to the grammar that calls are held to, which must take them whole, and must not take a
call whose argument is of the wrong type.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path

from llama_worker._chat.analysis import analyse, format_of
from llama_worker._chat.format import ChatFormat
from llama_worker._chat.marks import whole_prefix
from llama_worker._chat.parser import OutputParser
from llama_worker._chat.template import ChatTemplate
from llama_worker._constraint.compiler import ConstraintCompiler
from llama_worker._constraint.grammar import grammar_of
from llama_worker._constraint.matcher import Constraint
from llama_worker._errors import TemplateError
from llama_worker._events import ToolCallEnded
from llama_worker._requests import GenerationRequest, Message, ToolCall, ToolSpec
from llama_worker.testing import ByteTokenizer
from tests.chat.templates import shipped_templates

TODAY = date(2026, 1, 31)
TOOLS = (
    ToolSpec(
        name="get_weather",
        description="The weather of some days.",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "the city"},
                "days": {"type": "integer", "description": "how many days"},
            },
            "required": ["city", "days"],
        },
    ),
    ToolSpec(
        name="find_hotel",
        description="Hotels in a city.",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "the city"},
                "stars": {"type": "integer", "description": "at least so many"},
            },
            "required": ["city", "stars"],
        },
    ),
)
WEATHER = ToolCall(id="call00001", name="get_weather", arguments={"city": 'Zürich "x" 5 < 6 & 7\nline', "days": -7})
HOTEL = ToolCall(id="call00002", name="find_hotel", arguments={"city": "it's {ok}", "stars": 4})
WRONG = ToolCall(id="call00001", name="get_weather", arguments={"city": "Bern", "days": "many"})
_TRIP = {
    "who": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    },
    "stops": {"type": "array", "items": {"type": "object", "properties": {"city": {"type": "string"}}}},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "cheap": {"type": "boolean"},
    "most": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    "seat": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
}
PLAN = ToolSpec(
    name="plan_trip",
    description="Plans a journey.",
    parameters={"type": "object", "properties": _TRIP, "required": list(_TRIP)},
)
TRIP = ToolCall(
    id="call00001",
    name="plan_trip",
    arguments={
        "who": {"name": 'Bo "x"', "tags": ["a", "{b}"]},
        "stops": [{"city": "Bern"}, {"city": "Ulm"}],
        "note": None,
        "cheap": True,
        "most": None,
        "seat": "12",
    },
)
_ASKED = Message(role="user", content="What is the weather like?")
_ANSWER = Message(role="assistant", content="It is dry.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found out about one template. None: does not apply."""

    name: str
    format: ChatFormat
    renders: bool
    one_call: bool
    two_calls: bool | None
    nested: bool
    accepts_own: bool
    rejects_wrong: bool
    milliseconds: float
    compiling: float

    @property
    def round_trips(self) -> bool:
        return self.one_call and self.two_calls is not False


def rows() -> list[Row]:
    compiler = ConstraintCompiler(ByteTokenizer())
    return [_row(name, template, compiler) for name, template in shipped_templates().items()]


def _row(name: str, template: ChatTemplate, compiler: ConstraintCompiler) -> Row:
    format = format_of(template)
    several = format.calls is not None and format.calls.separator is not None
    return Row(
        name=name,
        format=format,
        renders=_renders(template, format),
        one_call=_parses_back(template, format, [WEATHER]),
        two_calls=_parses_back(template, format, [WEATHER, HOTEL]) if several else None,
        nested=_parses_back(template, format, [TRIP], [PLAN]),
        accepts_own=_accepts(template, format, compiler, [WEATHER, HOTEL] if several else [WEATHER]),
        rejects_wrong=not _accepts(template, format, compiler, [WRONG]),
        milliseconds=_time_of(lambda: analyse(template)),
        compiling=_time_of(lambda: ChatTemplate(template.source, bos_text="<s>", eos_text="</s>")),
    )


# ---- rendering


def _renders(template: ChatTemplate, format: ChatFormat) -> bool:
    """A whole conversation: everything that was said, called and described is in the prompt."""
    chat = [
        Message(role="system", content="You are brief."),
        _ASKED,
        Message(role="assistant", content="", tool_calls=(WEATHER,)),
        Message(role="tool", content="It rains.", tool_call_id=WEATHER.id),
        Message(role="assistant", content="There is rain."),
        Message(role="user", content="And a hotel?"),
    ]
    try:
        text = template.lay_out(chat, tools=TOOLS, format=format, today=TODAY).text
    except TemplateError:
        return False
    words = [message.content for message in chat] + [tool.description for tool in TOOLS]
    return all(word in text for word in [*words, "get_weather", "find_hotel", "rich", "-7"])


def reply_of(
    template: ChatTemplate, format: ChatFormat, calls: Sequence[ToolCall], tools: Sequence[ToolSpec] = TOOLS
) -> tuple[str, str]:
    """A turn of `calls` as the template renders it: the prompt before it, and what the model would have said."""
    prompt = template.lay_out([_ASKED], tools=tools, format=format, today=TODAY).text
    whole, text = (
        template.lay_out([_ASKED, said], tools=tools, format=format, add_generation_prompt=False, today=TODAY).text
        for said in (Message(role="assistant", content="", tool_calls=tuple(calls)), _ANSWER)
    )
    shared = whole_prefix(whole, prompt)
    return shared, whole[len(shared) :].removesuffix(text.rpartition(_ANSWER.content)[2])


# ---- parsing


def _parses_back(
    template: ChatTemplate, format: ChatFormat, calls: Sequence[ToolCall], tools: Sequence[ToolSpec] = TOOLS
) -> bool:
    try:
        prompt, reply = reply_of(template, format, calls, tools)
    except TemplateError:
        return False
    return parsed(format, prompt, reply, tools) == [(call.name, call.arguments) for call in calls]


def parsed(format: ChatFormat, prompt: str, reply: str, tools: Sequence[ToolSpec] = TOOLS) -> list[tuple[str, object]]:
    """The calls in `reply`: name and arguments, or name and error."""
    thoughts = format.reasoning
    numbers = count()
    parser = OutputParser(
        format,
        tools,
        calls=True,
        in_reasoning=thoughts is not None and prompt.rstrip().endswith(thoughts.open.strip()),
        new_id=lambda: f"id{next(numbers)}",
    )
    ended = [event.call for event in (*parser.feed(reply), *parser.flush()) if isinstance(event, ToolCallEnded)]
    return [(call.name, call.arguments if isinstance(call, ToolCall) else call.error) for call in ended]


# ---- the grammar


def _accepts(
    template: ChatTemplate, format: ChatFormat, compiler: ConstraintCompiler, calls: Sequence[ToolCall]
) -> bool:
    """Whether the grammar takes the template's own rendering of `calls`, whole, and then lets the reply end."""
    try:
        _, reply = reply_of(template, format, calls)
    except TemplateError:
        return False
    return accepted(format, compiler, _from_opening(format, reply), calls)


def accepted(format: ChatFormat, compiler: ConstraintCompiler, text: str, calls: Sequence[ToolCall]) -> bool:
    request = GenerationRequest(messages=(_ASKED,), tools=TOOLS, tool_choice="required", parallel_tool_calls=True)
    grammar = grammar_of(request, format, in_reasoning=False)
    assert grammar is not None
    constraint = compiler.constraint(grammar)
    read, done, may_end = text.encode(), 0, 0
    while done < len(read) and not constraint.is_complete and _allows(constraint, read[done]):
        constraint.accept(read[done])
        done += 1
        if constraint.is_complete or any(_allows(constraint, token) for token in ByteTokenizer.end_tokens):
            may_end = done
    rest = read[may_end:].decode(errors="replace")
    return may_end > 0 and not any(word in rest for call in calls for word in (call.name, *call.arguments))


def _allows(constraint: Constraint, token: int) -> bool:
    return bool(constraint.mask()[token // 8] >> token % 8 & 1)


def _from_opening(format: ChatFormat, reply: str) -> str:
    """From where the calls begin: without the empty thought, or the blanks, before them."""
    assert format.calls is not None
    first = format.calls.call[0]
    opening = format.calls.section_open + (first if isinstance(first, str) else "")
    return reply[max(reply.find(opening), 0) :]


# ---- the page


def _time_of(done: Callable[[], object]) -> float:
    """The fastest of three, in milliseconds of CPU, so that what else the machine does counts little."""
    times = []
    for _ in range(3):
        started = time.thread_time()
        done()
        times.append(time.thread_time() - started)
    return min(times) * 1e3


_HEAD = """# Chat templates

Written by `python -m tests.chat.template_table`: the {n} templates that llama.cpp ships, as llama-worker sees them.

* **format**: where it is known from how the model calls: *derived* from what the template renders, *data* of ours,
  *generic* where the template knows no calls.
* **tools**, **calls**: whether the template renders tools and past calls by itself; otherwise we write them.
* **renders**: system, user, call, result, answer, user, with two tools: all of it is in the prompt.
* **one**, **two**: past calls, as rendered, are parsed back; – where a turn has one call at most.
* **nested**: so is a call with an object, a list, a boolean, nulls and a text where a number could be. Where a
  template writes these in a way of its own, a model is held to JSON all the same, and past calls are given to the
  template so that they are written alike.
* **accepts**: the grammar that calls are held to takes the template's own rendering.
* **rejects**: it does not take a call with a word where a number is due.

"""

_TAIL = """
What is not so, and what it means: gpt-oss writes the recipient of a call behind the channel, its template before it, so
past calls as rendered are not read back; its own are read and held as the model writes them. Command-R+ renders
indented JSON, and Reka-Edge `\\u` escapes: models are held to JSON without extra blanks and with characters as they
are, and both forms are read.
"""


def page(found: Sequence[Row]) -> str:
    lines = ["| template | format | tools | calls | thoughts | renders | one | two | nested | accepts | rejects | ms |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    lines += [_line(row) for row in found]
    return _HEAD.format(n=len(found)) + "\n".join([*_summary(found), "", *lines, ""]) + _TAIL


def _summary(found: Sequence[Row]) -> list[str]:
    rendered = [row for row in found if row.renders]
    trips, accepting = sum(row.round_trips for row in rendered), sum(row.accepts_own for row in rendered)
    nested, rejecting = sum(row.nested for row in rendered), sum(row.rejects_wrong for row in rendered)
    return [
        f"{len(rendered)} of {len(found)} render with tools; of these {trips} round-trip, {nested} with nested values; "
        f"{accepting} grammars accept their own rendering and {rejecting} reject a wrong type.",
        f"Jinja compiles a template in {statistics.median(row.compiling for row in found):.1f} ms (median), once for "
        "each model that is loaded.",
        f"Analysis takes {statistics.median(row.milliseconds for row in found):.1f} ms (median), "
        f"{max(row.milliseconds for row in found):.1f} ms at most.",
    ]


def _line(row: Row) -> str:
    thoughts = row.format.reasoning.open.strip().replace("|", "\\|") if row.format.reasoning else ""
    checks = [row.renders, row.one_call, row.two_calls, row.nested, row.accepts_own, row.rejects_wrong]
    cells = [
        row.name,
        row.format.origin,
        "yes" if row.format.takes_tools else "no",
        "yes" if row.format.takes_calls else "no",
        f"`{thoughts}`" if thoughts else "",
        *("–" if check is None else "yes" if check else "**no**" for check in checks),
        f"{row.milliseconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    found = rows()
    target = Path(__file__).parents[2] / "docs" / "templates.md"
    target.write_text(page(found), "utf-8")
    sys.stdout.write("\n".join([*_summary(found), f"written to {target.name}", ""]))


if __name__ == "__main__":
    main()
