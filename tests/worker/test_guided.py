"""A guided reply: what the constraint leaves, what it forces in one chunk, and how it ends, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llama_worker import Failed, Finished, GenerationError
from llama_worker._cancel import CancelFlag
from llama_worker._commands import Generate
from llama_worker._engine.base import DecodeStatus, Mask
from llama_worker._events import ReasoningDelta, ReplyEvent, TextDelta
from llama_worker._guide import Guide
from llama_worker.testing import ByteTokenizer, Fault, fake_loader
from llama_worker.testing._tokenizer import IM_END
from tests.worker.bench import Bench, ListSink

N_VOCAB = ByteTokenizer.n_tokens


class Pattern:
    """A constraint by hand: for each byte of the reply what it may be, then the end.

    `accepted` is what it was told; a mask or a token that does not fit fails a test.
    """

    def __init__(self, allowed: Sequence[str], *, ends: bool = True) -> None:
        self.allowed = [set(part.encode()) for part in allowed]
        self.accepted: list[int] = []
        self.n_masks = 0
        self._ends = ends

    def mask(self) -> Mask:
        self.n_masks += 1
        bits = np.zeros(N_VOCAB, np.uint8)
        at = len(self.accepted)
        bits[list(self.allowed[at]) if at < len(self.allowed) else [IM_END]] = 1
        return np.packbits(bits, bitorder="little")

    def accept(self, token: int) -> None:
        assert token in self.allowed[len(self.accepted)], (token, len(self.accepted))
        self.accepted.append(token)

    def forced(self) -> list[int]:
        forced = []
        while not self.is_complete and len(self.accepted) < len(self.allowed) and len(self._next) == 1:
            forced.append(*self._next)
            self.accepted.append(forced[-1])
        return forced

    @property
    def _next(self) -> set[int]:
        return self.allowed[len(self.accepted)]

    @property
    def is_complete(self) -> bool:
        return self._ends and len(self.accepted) == len(self.allowed)

    @property
    def said(self) -> str:
        return bytes(self.accepted).decode()


class Thinker:
    """A parser by hand: thoughts up to `</t>`, then text."""

    def __init__(self) -> None:
        self.in_reasoning, self._held = True, ""

    def feed(self, text: str) -> list[ReplyEvent]:
        if not self.in_reasoning:
            return [TextDelta(text)]
        self._held += text
        thought, tag, rest = self._held.partition("</t>")
        if not tag:
            return []
        self.in_reasoning = False
        return [*([ReasoningDelta(thought)] if thought else []), *([TextDelta(rest)] if rest else [])]

    def flush(self) -> list[ReplyEvent]:
        return [ReasoningDelta(self._held)] if self.in_reasoning and self._held else []


def words(*parts: str | Sequence[str]) -> list[str]:
    """`"abc"`: these letters one after another; `["xyz"]`: one of these."""
    return [letters for part in parts for letters in (part if isinstance(part, str) else [*part])]


def guided(
    bench: Bench,
    constraint: Pattern | None,
    prompt: str = "question",
    *,
    budget: int | None = None,
    closing: str = "",
    opening: Sequence[int] = (),
    parser: Any = None,
    **params: Any,
) -> tuple[ListSink, CancelFlag]:
    command = bench.request(prompt, **{"max_tokens": 64, "temperature": 0.0, **params})
    guide = Guide(
        constraint, budget=budget, closing=list(closing.encode()), skips=command.job.request.params.logprobs is None
    )
    job = replace(command.job, guide=guide, parser=parser, opening=tuple(opening))
    command = replace(command, job=job)
    bench.put(command)
    assert isinstance(command.sink, ListSink)
    return command.sink, command.cancel


def ended(sink: ListSink) -> Finished:
    end = sink.terminal
    assert isinstance(end, Finished), end
    return end


def run(bench: Bench, *sinks: ListSink) -> None:
    for _ in range(400):
        if all(sink.is_answered for sink in sinks):
            return
        bench.step()
    raise AssertionError("it never ended")


DIGITS = "0123456789"
OBJECT = words('{"key": ', [DIGITS], [DIGITS], ', "other": ', ["TF"], "}")


def test_a_reply_is_what_its_constraint_leaves() -> None:
    bench, constraint = Bench("42T").load(), Pattern(OBJECT)
    sink, _ = guided(bench, constraint)
    run(bench, sink)
    end = ended(sink)
    assert end.text == '{"key": 42, "other": T}' == constraint.said
    assert (end.reason, end.usage.completion_tokens) == ("stop", len(end.text))


def test_what_must_come_is_decoded_as_one_chunk() -> None:
    bench = Bench("42T").load()
    before = bench.service.n_steps
    sink, _ = guided(bench, Pattern(OBJECT))
    run(bench, sink)
    # The prompt, then a token and a token before each choice: { is sampled, 4, 2, and T.
    assert bench.service.n_steps - before <= 6
    assert bench.engine.calls.count("sample") == 4


def test_an_opening_is_part_of_the_reply_and_decoded_with_the_prompt() -> None:
    bench, constraint = Bench("42T").load(), Pattern(OBJECT)
    opening = constraint.forced()
    sink, _ = guided(bench, constraint, opening=opening)
    run(bench, sink)
    end = ended(sink)
    assert end.text == '{"key": 42, "other": T}'
    assert end.usage.prompt_tokens + end.usage.completion_tokens == len("<question") + len(end.text)
    assert bench.engine.calls.count("sample") == 3


def test_a_reply_that_is_all_opening_needs_no_decoding() -> None:
    bench, constraint = Bench().load(), Pattern(words("yes"))
    sink, _ = guided(bench, constraint, opening=constraint.forced())
    run(bench, sink)
    assert (ended(sink).text, ended(sink).reason) == ("yes", "stop")
    assert "sample" not in bench.engine.calls


@pytest.mark.parametrize("max_tokens", range(1, 24))
def test_max_tokens_holds_also_for_what_is_forced(max_tokens: int) -> None:
    bench, whole = Bench("42T").load(), '{"key": 42, "other": T}'
    sink, _ = guided(bench, Pattern(OBJECT), max_tokens=max_tokens)
    run(bench, sink)
    end = ended(sink)
    assert end.text == whole[:max_tokens]
    assert end.usage.completion_tokens == max_tokens
    assert end.reason == ("stop" if max_tokens == len(whole) else "length")


def test_logprobs_are_the_models_own_and_then_nothing_is_skipped() -> None:
    bench = Bench("42T").load()
    sink, _ = guided(bench, Pattern(OBJECT), logprobs=2)
    run(bench, sink)
    end = ended(sink)
    assert "".join(entry.text for entry in end.logprobs) == end.text
    assert all(-100 < entry.logprob < 0 and len(entry.top) == 2 for entry in end.logprobs)
    assert bench.engine.calls.count("sample") == len(end.text)


def test_a_constraint_may_leave_the_end_to_the_model() -> None:
    bench = Bench("42T").load()
    sink, _ = guided(bench, Pattern(OBJECT, ends=False))
    run(bench, sink)
    assert (ended(sink).text, ended(sink).reason) == ('{"key": 42, "other": T}', "stop")


def test_replies_under_different_constraints_share_a_batch() -> None:
    bench = Bench("7", "x", "free text").load()
    patterns = [Pattern(words("n=", [DIGITS], ";")), Pattern(words("letter ", ["xyz"], "!"))]
    sinks = [guided(bench, pattern, f"q{i}")[0] for i, pattern in enumerate(patterns)]
    sinks.append(bench.ask("q3", max_tokens=20)[0])
    run(bench, *sinks)
    assert [ended(sink).text for sink in sinks] == ["n=7;", "letter x!", "free text"]


@pytest.mark.parametrize("how", ["mask", "accept", "forced"])
@pytest.mark.parametrize("error", [RuntimeError("secret text"), GenerationError("typed")], ids=["any", "typed"])
def test_a_constraint_that_fails_fails_its_own_request(how: str, error: Exception) -> None:
    class Broken(Pattern):
        def broken(self, *_: object) -> Any:
            raise error

    constraint = Broken(OBJECT)
    setattr(constraint, how, constraint.broken)
    bench = Bench("42T", "other").load()
    sink, _ = guided(bench, constraint)
    other, _ = bench.ask("innocent")
    run(bench, sink, other)
    end = sink.terminal
    assert isinstance(end, Failed)
    assert isinstance(end.error, GenerationError)
    assert "secret" not in str(end.error)
    assert ended(other).text == "other"
    assert bench.scheduler.is_idle


def test_a_mask_that_leaves_nothing_fails_its_own_request() -> None:
    bench = Bench("4", "other").load()
    sink, _ = guided(bench, Pattern(words("ab", [""], "c")))
    other, _ = bench.ask("innocent")
    run(bench, sink, other)
    assert isinstance(sink.terminal, Failed)
    assert ended(other).text == "other"


def test_a_cancelled_reply_ends_in_the_midst_of_what_is_forced() -> None:
    bench = Bench("42T").load()
    sink, cancel = guided(bench, Pattern(OBJECT))
    bench.step()
    cancel.cancel()
    run(bench, sink)
    assert ended(sink).reason == "cancelled"
    assert '{"key": 42, "other": T}'.startswith(ended(sink).text)


def test_a_stop_string_ends_what_is_forced() -> None:
    bench = Bench("42T").load()
    sink, _ = guided(bench, Pattern(OBJECT), stop="other")
    run(bench, sink)
    assert (ended(sink).text, ended(sink).reason) == ('{"key": 42, "', "stop")


@pytest.mark.parametrize("nth", range(1, 8))
@pytest.mark.parametrize("status", [DecodeStatus.ABORTED, DecodeStatus.KV_FULL])
@pytest.mark.parametrize("hybrid", [False, True])
def test_an_aborted_or_refused_decode_leaves_constraint_and_tokens_in_step(
    nth: int, status: DecodeStatus, hybrid: bool
) -> None:
    engines: list[Any] = []
    loader = fake_loader("42T", "42T", faults=[Fault("decode", status, nth)], hybrid=hybrid, seen=engines.append)
    bench = Bench(loader=loader).load()
    patterns = [Pattern(OBJECT), Pattern(OBJECT)]
    sinks = [guided(bench, pattern, f"question {i}")[0] for i, pattern in enumerate(patterns)]
    run(bench, *sinks)
    for sink, pattern in zip(sinks, patterns, strict=True):
        assert ended(sink).text == pattern.said == '{"key": 42, "other": T}'


def test_a_preempted_reply_goes_on_where_it_was() -> None:
    """Too few cells for both: the younger one loses its slot, and computes what it had said again."""
    bench = Bench("1" * 60, "2" * 60, n_ctx=256, n_kv_cells=256, n_ubatch=32).load()
    pattern = words("value: ", [DIGITS] * 20, " then ", [DIGITS] * 20, " done")
    patterns = [Pattern(pattern), Pattern(pattern)]
    sinks = [guided(bench, p, str(i) * 85, max_tokens=80)[0] for i, p in enumerate(patterns)]
    run(bench, *sinks)
    assert bench.service.meter.preemptions > 0, "nobody was preempted; the test shows nothing"
    for sink, digit in zip(sinks, "12", strict=True):
        assert ended(sink).text == f"value: {digit * 20} then {digit * 20} done"


# --- thoughts


def test_a_budget_closes_the_thought_and_the_answer_is_begun() -> None:
    bench = Bench("thinking and thinking").load()
    sink, _ = guided(bench, None, budget=5, closing="</t>", parser=Thinker(), max_tokens=30)
    run(bench, sink)
    end = ended(sink)
    assert end.reasoning == "think"
    assert end.text.startswith("ing and")
    assert end.usage.reasoning_tokens == 5 + len("</t>")


def test_a_thought_that_ends_in_time_is_not_closed() -> None:
    bench = Bench("so</t>hello").load()
    sink, _ = guided(bench, None, budget=9, closing="</t>", parser=Thinker())
    run(bench, sink)
    assert (ended(sink).reasoning, ended(sink).text) == ("so", "hello")
    assert ended(sink).usage.reasoning_tokens == len("so</t>")


def test_the_constraint_hears_of_the_closing_tag() -> None:
    bench = Bench("abcdefgh7").load()
    letters = "abcdefghijklmnopqrstuvwxyz"
    constraint = Pattern(words([letters] * 3, "</t>", "n=", [DIGITS]))
    sink, _ = guided(bench, constraint, budget=3, closing="</t>", parser=Thinker())
    run(bench, sink)
    assert (ended(sink).reasoning, ended(sink).text) == ("abc", "n=7")
    assert constraint.said == "abc</t>n=7"


def test_a_character_is_finished_before_the_thought_is_closed() -> None:
    bench = Bench("äöü and more").load()
    sink, _ = guided(bench, None, budget=3, closing="</t>", parser=Thinker())
    run(bench, sink)
    assert ended(sink).reasoning == "äö"
    assert "\ufffd" not in ended(sink).text


def test_a_closing_tag_that_the_constraint_refuses_fails_the_request() -> None:
    bench = Bench("abc").load()
    sink, _ = guided(bench, Pattern(words("abcdef")), budget=1, closing="</t>", parser=Thinker())
    run(bench, sink)
    assert isinstance(sink.terminal, Failed)


def test_a_command_keeps_its_guide_to_itself() -> None:
    """Jobs of plain requests carry none: nothing is asked of it for each token."""
    command = Bench().load().request("hello")
    assert isinstance(command, Generate)
    assert (command.job.guide, command.job.parser, command.job.opening) == (None, None, ())


def test_a_constraint_that_forces_for_ever_ends_by_length() -> None:
    class Endless(Pattern):
        def forced(self) -> list[int]:
            return list(b"ab")

    bench = Bench("x").load()
    sink, _ = guided(bench, Endless(words("x")), max_tokens=33)
    run(bench, sink)
    assert (ended(sink).reason, ended(sink).usage.completion_tokens) == ("length", 33)
