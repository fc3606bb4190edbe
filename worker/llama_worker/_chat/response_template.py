"""to_response_template, from_response_template: ChatFormat as what transformers and vLLM read replies with.

Their `response_template` is a dict of regions: what opens one, what closes it and how its content is read. A call
that is a JSON object, or one of an array, is such a content whole (`json_call.py`). Of any other the region is
opened by all that stands before the arguments, and closed by all behind them. What the one can say and the other
cannot is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from llama_worker._chat.format import CallSyntax, ChatFormat, Part, ReasoningSyntax, Slot, Tagged, TextSyntax
from llama_worker._chat.json_call import JsonCall, json_call, json_parts
from llama_worker._chat.patterns import Sign, Token, choice_of, pattern_of, read_pattern
from llama_worker._chat.reading import trigger_of
from llama_worker._errors import InvalidRequestError, UnsupportedFeatureError

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def to_response_template(format: ChatFormat) -> dict[str, Any]:
    """The `response_template` that reads the replies of `format`.

    It reads what the format writes, but does not know how JSON is spaced. Raises UnsupportedFeatureError for what it
    cannot express: arguments in a JSON string, a name as a key, calls that nothing marks, values whose end or type is
    not told by a text.
    """
    fields: dict[str, Any] = {}
    if format.reasoning is not None:
        thoughts = format.reasoning
        fields["reasoning_content"] = {"open": thoughts.open, "close": thoughts.close, "content": "text"}
    if format.calls is not None:
        fields["tool_calls"] = _calls_field(format.calls)
    marks = {"open": format.text.open, "close": format.text.close}
    fields["content"] = {**{key: text for key, text in marks.items() if text}, "content": "text"}
    anchor = format.turn_open or _cannot("a reply of which it is not known what stands before it")
    return {"version": 1, "defaults": {"role": "assistant"}, "start_anchor": anchor, "fields": fields}


def from_response_template(template: Mapping[str, Any]) -> ChatFormat:
    """What `template` reads, as a ChatFormat without a digest.

    Its patterns may be texts, choices of texts, blanks (taken as a line break) and the groups name, id, key and
    value. What closes a text that nothing opens is the end of the turn, which the vocabulary knows. Raises
    InvalidRequestError for all else, with the field.
    """
    fields = _mapping(template.get("fields"), "response_template.fields")
    for name in fields:
        if name not in (*_THOUGHTS, "tool_calls", "content"):
            _wrong(f"fields.{name}", name, "only thoughts, tool_calls and content are understood")
    thoughts = next((_mapping(fields[name], name) for name in _THOUGHTS if name in fields), None)
    content = _mapping(fields.get("content", {}), "fields.content")
    text = TextSyntax(open=_literal(content, "open"), close=_literal(content, "close") if "open" in content else "")
    return ChatFormat(
        digest="",
        origin="data",
        calls=_calls(_mapping(fields["tool_calls"], "tool_calls"), text) if "tool_calls" in fields else None,
        reasoning=_reasoning(thoughts) if thoughts else None,
        text=text,
        turn_open=_literal(template, "start_anchor"),
    )


# ---- writing


def _cannot(what: str) -> NoReturn:
    raise UnsupportedFeatureError(f"a response_template for {what}", "transformers has no word for it")


def _calls_field(syntax: CallSyntax) -> dict[str, Any]:
    if not syntax.trigger:
        _cannot("calls that nothing marks")
    if syntax.arguments == "json" and (whole := json_call(syntax)) is not None:
        return _json_field(syntax, whole)
    at = syntax.call.index(Slot.ARGUMENTS)
    before, after = list(syntax.call[:at]), list(syntax.call[at + 1 :])
    if Slot.NAME in after or (after and str(after[0]).startswith("}") and syntax.arguments == "json"):
        _cannot("a name behind the arguments" if Slot.NAME in after else "a name as a key")
    content = _content(syntax, before, after)
    return {**_region(syntax, pattern_of(before), pattern_of(after)), **content, "transform": _each(syntax, _CALL)}


def _json_field(syntax: CallSyntax, whole: JsonCall) -> dict[str, Any]:
    if whole.in_array:
        opened, closed = syntax.section_open.rstrip()[:-1], syntax.section_close.lstrip()[1:]
        start = _start(syntax) + (re.escape(opened) or r"(?=\[)")
        transform = {"transform": whole.transform(""), "transform_each": True}
        return {
            "open_pattern": start,
            "close_pattern": re.escape(closed) or Sign.END.value,
            "content": "json",
            **transform,
        }
    region = _region(syntax, _loose(whole.before) or r"(?=\{)", _loose(whole.after))
    return {**region, "content": "json", "transform": _each(syntax, whole.transform("content."))}


def _loose(text: str) -> str:
    """The pattern of `text`, in which a line break may as well be other blanks, or none."""
    return r"\s*".join(re.escape(line) for line in text.split("\n"))


def _start(syntax: CallSyntax) -> str:
    return (Sign.START.value if syntax.only_at_start else "") + Sign.BLANKS.value


def _each(syntax: CallSyntax, call: dict[str, Any]) -> object:
    """Of several calls each is told by itself; one alone is a list of one."""
    return [call] if syntax.separator is None else call


def _region(syntax: CallSyntax, opened: str, closed: str) -> dict[str, Any]:
    section = choice_of(syntax.section_open, "") if syntax.section_open else ""
    several = syntax.separator is not None
    ends = choice_of(syntax.separator or "", syntax.section_close) if several else re.escape(syntax.section_close)
    return {
        "open_pattern": _start(syntax) + section + opened,
        "close_pattern": closed + ends or _until_next(syntax),
        **({"repeats": True} if several else {}),
    }


def _until_next(syntax: CallSyntax) -> str:
    """For a call that ends with its arguments: up to the next one."""
    first = syntax.call[0]
    again = re.escape(first) if isinstance(first, str) and syntax.separator is not None else ""
    return f"(?={again})|{Sign.END.value}" if again else Sign.END.value


def _content(syntax: CallSyntax, before: list[Part], after: list[Part]) -> dict[str, Any]:
    """How the arguments are read. An object's braces are taken out of `before` and `after`: they belong to it."""
    match syntax.arguments:
        case "json":
            return {"content": "json"}
        case Tagged() as tagged if _is_loose_json(tagged, before, after):
            before[-1], after[0] = str(before[-1])[:-1], str(after[0])[1:]
            marks = [tagged.string_open[1:], tagged.string_close]
            return {"content": "json", "content_args": {"unquoted_keys": True, "string_delims": [marks]}}
        case Tagged() as tagged if tagged.string_close and tagged.value_close and tagged.type_close is None:
            return {"content": "xml-inline", "content_args": {"tag_pattern": _tag_pattern(tagged)}}
        case Tagged():
            _cannot("values whose end or type is not told by a text")
        case _:
            _cannot("arguments in a JSON string")


def _is_loose_json(tagged: Tagged, before: list[Part], after: list[Part]) -> bool:
    around = bool(before and after) and str(before[-1]).endswith("{") and str(after[0]).startswith("}")
    plain = (tagged.key_open, tagged.value_open, tagged.value_close, tagged.between) == ("", ":", "", ",")
    return around and plain and tagged.string_open[:1] == ":" and not tagged.json_strings


def _tag_pattern(tagged: Tagged) -> str:
    again = "" if tagged.key_again is None else Sign.KEY_AGAIN.value + re.escape(tagged.key_again)
    between = choice_of(tagged.between, "") if tagged.between else ""
    opened, closed = (
        choice_of(tagged.string_open, tagged.value_open),
        choice_of(tagged.string_close, tagged.value_close),
    )
    return f"{re.escape(tagged.key_open)}(?P<key>.+?){opened}(?P<value>.*?){closed}{again}{between}"


# ---- reading


def _wrong(field: str, value: object, why: str) -> NoReturn:
    raise InvalidRequestError(f"response_template.{field}", value, why)


def _mapping(value: object, field: str) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else _wrong(field, value, "it must be a mapping")


def _literal(field: Mapping[str, Any], key: str) -> str:
    """The text of `key`, of several the first; "" for none."""
    value = field.get(key, "")
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else _wrong(key, value, "it must be a text, or a list of texts")


def _reasoning(field: Mapping[str, Any]) -> ReasoningSyntax:
    opened, closed = _literal(field, "open"), _literal(field, "close")
    if not opened or not closed:
        _wrong("fields.reasoning_content", sorted(field), "thoughts need the texts `open` and `close`")
    return ReasoningSyntax(open=opened, close=closed)


def _tokens(field: Mapping[str, Any], key: str) -> list[Token]:
    """The pattern of `key`, or its text."""
    if key in field:
        return [_literal(field, key)]
    pattern = field.get(f"{key}_pattern", "")
    try:
        return read_pattern(pattern.partition("(?=")[0].removesuffix(Sign.END.value))
    except (ValueError, AttributeError) as exc:
        _wrong(f"fields.tool_calls.{key}_pattern", pattern, str(exc))


_UNDERSTOOD = {
    *("open", "open_pattern", "close", "close_pattern", "content", "content_args"),
    *("repeats", "optional", "transform", "transform_each"),
}
_ARGS = {"unquoted_keys", "string_delims", "tag_pattern"}


def _calls(field: Mapping[str, Any], text: TextSyntax) -> CallSyntax:
    args = _mapping(field.get("content_args", {}), "fields.tool_calls.content_args")
    for name in [*sorted(set(field) - _UNDERSTOOD), *sorted(set(args) - _ARGS)]:
        _wrong("fields.tool_calls", name, "this is not understood")
    only_at_start, opened = _begins_with(_tokens(field, "open"), Sign.START)
    blanks, opened = _begins_with(opened, Sign.BLANKS)
    section_open = ""
    if opened and isinstance(opened[0], tuple):
        section_open, opened = opened[0][0], opened[1:]
    closed, ends = _without_choice(_tokens(field, "close"))
    before, after, arguments = _arguments(field, _parts(opened), _parts(closed))
    separator = None
    if field.get("transform_each"):
        section_open, separator, ends = _text(before) + "[", ", ", ("", "]" + _text(after))
        before, after = _object_parts(field, "")
    elif field.get("repeats"):
        separator = ends[0] if ends else "\n" if blanks and "close" in field else ""
    call = (*before, Slot.ARGUMENTS, *after)
    if Slot.NAME not in call:
        _wrong("fields.tool_calls", sorted(field), "nothing in it is the tool's name")
    first = section_open + (before[0] if before and isinstance(before[0], str) else "")
    return CallSyntax(
        call=call,
        arguments=arguments,
        section_open=section_open,
        separator=separator,
        section_close=ends[1] if len(ends) > 1 else "",
        trigger=trigger_of(first, (text.open,))[0],
        only_at_start=only_at_start,
    )


def _without_choice(tokens: list[Token]) -> tuple[list[Token], tuple[str, ...]]:
    """`tokens` without the choice of texts at their end, and that."""
    return (tokens[:-1], tokens[-1]) if tokens and isinstance(tokens[-1], tuple) else (tokens, ())


def _text(parts: list[Part]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def _transform(field: Mapping[str, Any]) -> Mapping[str, Any]:
    transform = field.get("transform")
    transform = transform[0] if isinstance(transform, list) and transform else transform
    return _mapping(transform, "fields.tool_calls.transform")


def _begins_with(tokens: list[Token], sign: Sign) -> tuple[bool, list[Token]]:
    """Whether `tokens` begin with `sign`, and what comes then."""
    return (True, tokens[1:]) if tokens[:1] == [sign] else (False, tokens)


def _parts(tokens: list[Token]) -> list[Part]:
    parts: list[Part] = []
    for token in tokens:
        part = "\n" if token is Sign.BLANKS else token
        if not isinstance(part, str | Slot):
            _wrong("fields.tool_calls", token, "a choice may only stand at the ends of a call")
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part:
            parts.append(part)
    return parts


def _arguments(
    field: Mapping[str, Any], before: list[Part], after: list[Part]
) -> tuple[list[Part], list[Part], Literal["json"] | Tagged]:
    """What stands before and behind the arguments, and how they are written."""
    args = field.get("content_args", {})
    match field.get("content", "text"):
        case "json" if field.get("transform_each"):
            return before, after, "json"
        case "json" if Slot.NAME not in before:
            return *_json_object(field, before, after), "json"
        case "json" if args.get("string_delims"):
            opened, closed = args["string_delims"][0]
            loose = Tagged(
                key_open="", string_open=f":{opened}", string_close=closed, value_open=":", value_close="", between=","
            )
            return _parts([*before, "{"]), _parts(["}", *after]), loose
        case "json" if not args:
            return before, after, "json"
        case "xml-inline":
            return before, after, _tagged(args.get("tag_pattern"))
    _wrong(
        "fields.tool_calls.content", field.get("content"), "it must be json or xml-inline, with the known content_args"
    )


def _object_parts(field: Mapping[str, Any], root: str) -> tuple[list[Part], list[Part]]:
    try:
        return json_parts(_transform(field), root)
    except ValueError as exc:
        _wrong("fields.tool_calls.transform", field.get("transform"), str(exc))


def _json_object(field: Mapping[str, Any], before: list[Part], after: list[Part]) -> tuple[list[Part], list[Part]]:
    """A call that is an object whole. Between it and tags such as <tool_call> there is a line break."""
    opened, closed = _object_parts(field, "content")
    lines = ["\n"] if _text(before).endswith(">") and not _text(before).endswith("|>") and "close" in field else []
    return _parts([*before, *lines, *opened]), _parts([*closed, *lines, *after])


def _tagged(pattern: object) -> Tagged:
    try:
        tokens = read_pattern(pattern) if isinstance(pattern, str) else []
    except ValueError as exc:
        _wrong("fields.tool_calls.content_args.tag_pattern", pattern, str(exc))
    tokens = _without_blanks(tokens)
    match tokens:
        case [str(key_open), Sign.KEY, str() | tuple() as opened, Sign.VALUE, str() | tuple() as closed, *rest]:
            string_open, value_open = (opened, opened) if isinstance(opened, str) else opened
            string_close, value_close = (closed, closed) if isinstance(closed, str) else closed
            key_again, between = _tail(rest)
            return Tagged(
                key_open=key_open,
                string_open=string_open,
                string_close=string_close,
                value_open=value_open,
                value_close=value_close,
                between=between,
                key_again=key_again,
            )
    _wrong("fields.tool_calls.content_args.tag_pattern", pattern, "it must be text, key, text, value, text")


def _without_blanks(tokens: list[Token]) -> list[Token]:
    joined: list[Token] = []
    for token in tokens:
        text = "\n" if token is Sign.BLANKS else token
        if isinstance(text, str) and joined and isinstance(joined[-1], str):
            joined[-1] += text
        else:
            joined.append(text)
    return joined


def _tail(rest: list[Token]) -> tuple[str | None, str]:
    """The closing behind the key that is named again, and what stands between two arguments."""
    again = None
    if rest[:1] == [Sign.KEY_AGAIN]:
        again = str(rest[1]) if len(rest) > 1 and isinstance(rest[1], str) else ""
        rest = rest[2:] if again else rest[1:]
    between = rest[0][0] if rest and isinstance(rest[0], tuple) else ""
    return again, between
