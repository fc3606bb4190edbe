"""read_reasoning, read_text: what stands around thoughts and texts in what a template renders for the Probe's chats."""

from __future__ import annotations

import re

from llama_worker._chat.format import ReasoningSyntax, TextSyntax
from llama_worker._chat.marks import first_tag, last_marker, whole_prefix, word_prefix
from llama_worker._chat.probe import ARGUMENTS, CONTENT, THOUGHT, Probe


def read_reasoning(probe: Probe) -> ReasoningSyntax | None:
    """How thoughts are written: as the template replays them, or as its source names them. None: no word of them."""
    shown = probe.thought if THOUGHT in probe.thought else probe.thought_and_call
    before, found, after = shown.partition(THOUGHT)
    closing = _thought_close(probe, after) if found else ""
    opening = _thought_open(probe, before, closing) if closing else ""
    return ReasoningSyntax(open=opening, close=closing) if opening and closing else _tags_in(probe.source)


def read_turn(probe: Probe, reasoning: ReasoningSyntax | None) -> str:
    """What stands before a reply, without the beginning of a thought: what is added to the chat for it, or, where
    nothing is, the tag with which the chat ends."""
    tags = (reasoning.open, reasoning.close) if reasoning else ()
    if added := probe.added_for_reply:
        return min((added.partition(tag)[0] for tag in tags), key=len, default=added)
    prompt = probe.prompt.rstrip()
    for tag in reversed(tags):
        prompt = prompt.removesuffix(tag).rstrip()
    return last_marker(prompt)


_THINK_TAG = re.compile(r"<(/)([\w:]*think[\w:]*)>|\[(/)(THINK)\]", re.IGNORECASE)


def _tags_in(source: str) -> ReasoningSyntax | None:
    for found in _THINK_TAG.finditer(source):
        opening = found[0].replace("/", "", 1)
        if opening in source:
            return ReasoningSyntax(open=opening, close=found[0])
    return None


def _thought_open(probe: Probe, before: str, closing: str) -> str:
    """What comes before a thought, in the reply or already in the prompt."""
    prompt = probe.thinking_prompt
    shared = whole_prefix(whole_prefix(before, prompt), probe.thinking_content)
    if opening := before[len(shared) :].strip():
        return opening
    begun = prompt[len(shared) :].strip()
    return begun if begun and not begun.startswith(closing) else last_marker(before)


def _thought_close(probe: Probe, after: str) -> str:
    """What comes after a thought, be it a text or a call."""
    text = probe.thought.partition(THOUGHT)[2].partition(CONTENT)[0]
    call = probe.thought_and_call.partition(THOUGHT)[2]
    if text and call:
        return word_prefix(text, call).strip() or first_tag(text.strip())
    return first_tag(after.strip())


def read_text(probe: Probe, reasoning: ReasoningSyntax | None) -> TextSyntax:
    """What stands around a reply's text where a call would have something else."""
    call = probe.calls(ARGUMENTS[0])
    if not call:
        return TextSyntax()
    opening = without_thought(probe.beside_calls.partition(CONTENT)[0].lstrip(), reasoning)
    if reasoning is not None and opening.strip() in (reasoning.open, reasoning.close):
        opening = ""
    closing = probe.text_close
    return TextSyntax(open=opening, close=closing if opening or call.startswith(closing) else "")


def without_thought(text: str, reasoning: ReasoningSyntax | None) -> str:
    """`text` without the empty thought before it, which is the prompt's or nobody's."""
    if reasoning is None:
        return text
    empty = re.match(rf"(?:{re.escape(reasoning.open)})?\s*{re.escape(reasoning.close)}\s*", text)
    return text[empty.end() :] if empty else text
