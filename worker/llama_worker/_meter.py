"""Meter: counts what a worker does, while it does it.

The worker thread writes and nobody waits: each group of numbers is one value that is replaced as a whole,
so a reader gets all of a group or nothing of it, without a lock. (The watchdog answers requests too, when it
has given the worker thread up; so answers, which are rare, are counted under a lock. Readers take none.)
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from llama_worker._metrics import BOUNDS, Answered, Distribution, Drafts, Work
from llama_worker._record import Answer, Record

if TYPE_CHECKING:
    from llama_worker._scheduler import Batch

K = TypeVar("K", bound=str)
_Buckets: TypeAlias = tuple[list[int], float]


class Histogram:
    """Times in buckets. One thread adds; any other may look."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state: _Buckets = ([0] * (len(BOUNDS) + 1), 0.0)

    def add(self, seconds: float, times: int = 1) -> None:
        counts, total = self._state
        counts = counts.copy()
        counts[bisect_left(BOUNDS, seconds)] += times
        self._state = counts, total + seconds * times

    def snapshot(self) -> Distribution:
        counts, total = self._state
        return Distribution(tuple(counts), total)


class Meter:
    """The counters of one worker, for as long as it lives."""

    def __init__(self) -> None:
        self.answers = Answered()
        self.queue_wait = Histogram()
        self.time_to_first_token = Histogram()
        self.inter_token = Histogram()
        self.step_time = Histogram()
        self.decode_errors: Mapping[str, int] = {}
        self.kv_recoveries = 0
        self.preemptions = 0
        self.reloads = 0
        self.reloads_failed = 0
        self.last_step: float | None = None
        self._work = (0, 0, 0, 0.0, 0.0)
        self._drafts = (0, 0)
        self._answering = threading.Lock()

    @property
    def work(self) -> Work:
        decodes, prefill_tokens, decode_tokens, prefill_seconds, decode_seconds = self._work
        return Work(
            decodes=decodes,
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
        )

    @property
    def drafts(self) -> Drafts:
        drafted, accepted = self._drafts
        return Drafts(drafted_tokens=drafted, accepted_drafts=accepted)

    def begun(self, record: Record, submitted: float, now: float) -> None:
        """The request got its first slot; called again, it does nothing."""
        if record.begun is None:
            record.begun = now
            self.queue_wait.add(now - submitted)

    def decoded(self, batch: Batch, started: float, ended: float) -> None:
        """The engine computed all rows of `batch`; those with an output are sampled next."""
        decoding = 0
        before: dict[float, int] = {}  # most were sampled at the same step before, so they share one entry
        for span, generation in zip(batch.spans, batch.parts, strict=True):
            if not span.output:
                continue
            record = generation.command.record
            last, record.last_token = record.last_token, ended
            record.n_tokens += 1
            if last is None:
                record.first_token = ended
                self.time_to_first_token.add(ended - generation.command.submitted)
            else:
                before[last] = before.get(last, 0) + 1
                decoding += len(span.tokens) == 1 or span.output > 1
        for last, times in before.items():
            self.inter_token.add(ended - last, times)
        self.step_time.add(ended - started)
        self._note_work(batch.n_rows - batch.n_drafts - decoding, decoding, ended - started)
        self.last_step = ended

    def drafted(self, n: int) -> None:
        """Behind a row of the last step were `n` drafts."""
        drafted, accepted = self._drafts
        self._drafts = drafted + n, accepted

    def accepted(self, record: Record) -> None:
        """One of them was right: its row is sampled too."""
        drafted, accepted = self._drafts
        self._drafts = drafted, accepted + 1
        decodes, prefill_tokens, decode_tokens, prefill_seconds, decode_seconds = self._work
        self._work = (decodes, prefill_tokens, decode_tokens + 1, prefill_seconds, decode_seconds)
        record.n_tokens += 1
        self.inter_token.add(0.0)

    def not_decoded(self, status: str) -> None:
        """The engine returned `status` instead."""
        self.decode_errors = _plus(self.decode_errors, status)

    def answered(self, answer: Answer, _record: Record) -> None:
        """A request is about to be answered. Any thread."""
        with self._answering:
            so_far = self.answers
            self.answers = _with_generation(so_far, answer) if answer.texts is None else _with_texts(so_far, answer)

    def reloaded(self, error: BaseException | None) -> None:
        if error is None:
            self.reloads += 1
        else:
            self.reloads_failed += 1

    def _note_work(self, prefilled: int, decoded: int, seconds: float) -> None:
        decodes, prefill_tokens, decode_tokens, prefill_seconds, decode_seconds = self._work
        self._work = (
            decodes + 1,
            prefill_tokens + prefilled,
            decode_tokens + decoded,
            prefill_seconds + seconds if prefilled else prefill_seconds,
            decode_seconds + seconds if decoded else decode_seconds,
        )


def _with_generation(so_far: Answered, answer: Answer) -> Answered:
    failure = None if answer.error is None else type(answer.error).__name__
    return replace(
        so_far,
        finished=so_far.finished if answer.reason is None else _plus(so_far.finished, answer.reason),
        failed=so_far.failed if failure is None else _plus(so_far.failed, failure),
        prompt_tokens=so_far.prompt_tokens + answer.usage.prompt_tokens,
        completion_tokens=so_far.completion_tokens + answer.usage.completion_tokens,
        cached_tokens=so_far.cached_tokens + answer.usage.cached_tokens,
    )


def _with_texts(so_far: Answered, answer: Answer) -> Answered:
    if answer.error is not None:
        return replace(so_far, embeds_failed=_plus(so_far.embeds_failed, type(answer.error).__name__))
    return replace(
        so_far,
        embeds=so_far.embeds + 1,
        embedded_texts=so_far.embedded_texts + (answer.texts or 0),
        embedded_tokens=so_far.embedded_tokens + answer.usage.prompt_tokens,
    )


def _plus(counts: Mapping[K, int], key: K) -> dict[K, int]:
    return {**counts, key: counts.get(key, 0) + 1}
