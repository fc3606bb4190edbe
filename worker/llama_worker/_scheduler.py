"""Scheduler: who is served next, and with which rows. Decisions only; the loop carries them out.

    add -> admit -> plan() -> [engine] -> commit()

Every generation is in exactly one of two lists: `waiting` (no slot) or `running` (a slot of its own).
One step takes every decoding sequence's one row first, then chunks of prompts: all that a ubatch takes
when nobody decodes, otherwise what fits into the latency budget. The shortest prompt goes first, for
that gives the shortest mean time to the first token; one that was passed over often enough goes before.

A waiting prompt that shares a prefix with one being prefilled right now waits for it: four agents with
one system prompt compute it once, also when they start at the same moment.

All rows of a batch are computed with the same adapters: where generations differ in them they take turns (see
`_turns`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from llama_worker._commands import Generate
from llama_worker._disk_tier import DiskTier
from llama_worker._draft import DraftModel
from llama_worker._engine.base import EngineLimits, Span, Vocabulary
from llama_worker._foresight import ReplyLengths, most_cells
from llama_worker._generation import Generation
from llama_worker._identity import KVIdentity
from llama_worker._loan import Loan
from llama_worker._pace import FEWEST_ROWS, Pace
from llama_worker._prefix_cache import PrefixCache
from llama_worker._seq_ops import KVOp, Trim
from llama_worker._slot import Slot
from llama_worker._speculation import Speculation
from llama_worker._tokens import TokenIds
from llama_worker._turns import Turns

PATIENCE = 8
"""So many steps may pass a prompt over before it goes first."""

WORTH_WAITING = 64
"""Waiting for another's prefill must save at least so many tokens."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one decode call. `parts[i]` is the generation that `spans[i]` belongs to.

    `n_drafts` of the rows are guesses: at the end of spans with more than one output.
    """

    spans: tuple[Span, ...]
    parts: tuple[Generation, ...]
    n_rows: int
    n_drafts: int = 0

    @property
    def kv(self) -> KVIdentity:
        """The adapters that all of it is computed with."""
        return self.parts[0].kv


class Scheduler:
    """The waiting and the running generations of one engine. The worker thread's."""

    def __init__(
        self, limits: EngineLimits, pace: Pace, budget: int = 0, speculation: Speculation | None = None
    ) -> None:
        self.waiting: list[Generation] = []
        self.running: list[Generation] = []
        self.cache = PrefixCache(
            n_seq=limits.n_seq,
            n_cells=limits.n_ctx,
            can_trim=limits.can_trim,
            can_share=limits.can_share,
            needs_checkpoints=limits.needs_checkpoints,
            can_save=limits.can_save,
            can_trim_restored=limits.can_trim_restored,
            budget=budget,
        )
        self._limits = limits
        self.disk: DiskTier | None = None
        self.pace = pace
        self.turns = Turns(pace)
        self.speculation = speculation
        self._lengths = ReplyLengths()
        self._refused: Generation | None = None  # there are no cells for it until somebody gives up his
        self._order = count()

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.waiting)} waiting | {self.cache!r}>"

    @property
    def has_room(self) -> bool:
        """Whether to take another request from the channel: as many may wait here as can run."""
        return len(self.waiting) < self._limits.n_seq

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def has_begun(self) -> bool:
        """Whether anybody was ever given a slot and is not finished: running, or preempted and waiting again."""
        return bool(self.running) or any(g.has_begun for g in self.waiting)

    def add(self, command: Generate, vocabulary: Vocabulary) -> Generation:
        """Let a request wait here for a slot."""
        generation = Generation(command, vocabulary, next(self._order))
        if self.speculation is not None:
            generation.drafter = self.speculation.drafter(
                generation.tokens, generation.n_prompt + command.job.max_tokens, command.job.request.speculate
            )
        self.waiting.append(generation)
        return generation

    def admit(self, *, newcomers: bool = True) -> Iterator[tuple[Generation, tuple[KVOp, ...]]]:
        """Give slots to those who wait, first come first served, and say what the engine must do: each time
        before the next is asked for, for not everything that is to be done succeeds.

        Without `newcomers` only to those who were preempted.
        """
        if self.disk is not None:
            self.disk.attend(self.waiting)
        for generation in [g for g in self.waiting if newcomers or g.has_begun]:
            if generation is self._refused or not self.cache.has_idle:
                break
            if not self._fits(generation):
                self._refused = generation
                break
            if self._should_wait(generation) or self._waits_for_disk(generation):
                continue
            loan = self._lend(generation)
            generation.slot = loan.slot
            if generation.cached is None:
                generation.cached = loan.reused
            self.running.append(generation)
            self.waiting.remove(generation)
            yield generation, loan.ops

    def spare(self) -> list[Generation]:
        """Of those who wait and want nothing but their prompts computed, those whose prompts are. They need no slot.

        An empty prompt is computed: of one id there is nothing to compute before a reply (see `_session_jobs`).
        """
        spared = []
        for generation in [g for g in self.waiting if g.is_prefill]:
            if not generation.n_prompt:
                generation.cached = 0
                spared.append(generation)
                continue
            slot = self.cache.find_whole(generation.tokens.view, generation.kv)
            if slot is not None:
                generation.cached = generation.n_prompt
                self._pin(generation, slot)
                spared.append(generation)
        return spared

    @property
    def prefilled(self) -> list[Generation]:
        """Those who run and have all that they want: their prompts are computed."""
        return [g for g in self.running if g.is_prefill and not g.n_left]

    @property
    def is_held_up(self) -> bool:
        """Whether nothing is to be done before the disk has answered."""
        return self.disk is not None and not self.running and bool(self.waiting) and self.disk.is_reading

    @property
    def is_short_of_cells(self) -> bool:
        """Whether the next step might find too few free cells."""
        return self.cache.cells.free < self._limits.n_ubatch

    def make_room(self) -> list[KVOp]:
        """Free cells for the next step: trim idle slots, then take the slot of the youngest running.

        Afterwards every decoding sequence has a cell, or somebody's prompt has, or only one generation
        is left.
        """
        ops: list[KVOp] = []
        wanted = min(sum(g.n_left for g in self.running), self._limits.n_ubatch)
        while self.cache.cells.free < wanted and (freeing := self.cache.evict(wanted - self.cache.cells.free)):
            ops += freeing
        while self.cache.cells.free < self._least_rows() and (freeing := self.preempt()):
            ops += freeing
        return ops

    def plan(self, most_rows: int | None = None) -> Batch | None:
        """The rows of the next step, at most `most_rows`; None when nobody runs. Changes nothing.

        Tokens are drafted in what room is left, while nobody's prompt is computed.
        """
        room = min(most_rows or self._limits.n_batch, self._limits.n_batch, self.cache.cells.free)
        decoding: list[Generation] = []
        prefilling: list[Generation] = []
        for generation in self.turns.members(self.running):
            (decoding if generation.is_decoding else prefilling).append(generation)
        parts = [(generation, 1) for generation in decoding[:room]]
        if prefilling:
            room -= len(parts)
            somebody_speaks = any(g.tokens.n > g.n_prompt for g in self.running)
            rows = min(room, self.pace.rows() if somebody_speaks else self._limits.n_ubatch)
            parts += _chunks(prefilling, rows, cuts=self.cache.checkpoints.has_room)
        if not parts:
            return None
        spans = tuple([_span(g, n) for g, n in parts])
        n_rows = sum([n for _, n in parts])
        n_drafts = 0
        if self.speculation is not None and not prefilling:
            spans = self.speculation.extended(spans, decoding[: len(parts)], room - n_rows)
            n_drafts = sum([len(span.tokens) for span in spans]) - n_rows
        return Batch(spans, tuple([g for g, _ in parts]), n_rows + n_drafts, n_drafts)

    def to_guess(self, draft: DraftModel) -> tuple[list[Generation], int]:
        """For whom `draft` should guess before the next step, and how many tokens; for nobody in a step that computes
        somebody's prompt."""
        members = list(self.turns.members(self.running))
        if self.speculation is None or not all(g.is_decoding for g in members):
            return [], 0
        room = min(self._limits.n_batch, self.cache.cells.free) - len(members)
        able = [g for g in members if g.slot is not None and draft.can_guess(g.slot.seq, g.tokens.n)]
        return self.speculation.to_guess(able, len(members), room)

    def guessed(self, parts: Sequence[Generation], guesses: Sequence[TokenIds], token_ms: float | None) -> None:
        """What the draft model guesses for each of `parts`; `token_ms`: see DraftModel."""
        for generation, guess in zip(parts, guesses, strict=True):
            if generation.drafter is not None and len(guess):
                generation.drafter.offer(guess)
        if self.speculation is not None and token_ms is not None:
            self.speculation.observe_guess(token_ms)

    def commit(self, batch: Batch) -> list[tuple[int, Generation]]:
        """The rows of `batch` are decoded. Returns (row, generation) for those that can be sampled now.

        Not those with drafts behind them, which are sampled one after the other.
        """
        row, outputs = 0, []
        for span, generation in zip(batch.spans, batch.parts, strict=True):
            assert generation.slot is not None
            self.cache.extend(generation.slot, span.tokens)
            row += len(span.tokens)
            if span.output == 1:
                outputs.append((row - 1, generation))
        if len(batch.parts) < len(self.running):
            served = set(map(id, batch.parts))
            for generation in [g for g in self.running if g.kv == batch.kv]:
                generation.passed_over = 0 if id(generation) in served else generation.passed_over + 1
            self.turns.served(batch.kv, self.running)
        return outputs

    def retire(self, generation: Generation) -> None:
        """The generation is over. Its slot keeps what it holds, for others."""
        self._refused = None
        if generation.has_begun and not generation.is_prefill:
            self._lengths.ended(generation.n_sampled)
        if generation.slot is not None:
            self._pin(generation, generation.slot)
            self.cache.give_back(generation.slot)
            generation.slot = None
        for group in (self.running, self.waiting):
            if generation in group:
                group.remove(generation)

    def preempt(self) -> tuple[KVOp, ...]:
        """Take the slot of the youngest running generation, which waits again, first in line.

        Nothing when only one runs: there is nobody to make room for.
        """
        if len(self.running) < 2:
            return ()
        youngest = max(self.running, key=lambda g: g.order)
        slot = youngest.slot
        assert slot is not None
        self._refused = None
        ops = self.cache.take_away(slot)
        self.cache.give_back(slot)
        self.waiting.insert(0, youngest)
        youngest.slot = None
        self.running.remove(youngest)
        return ops

    def start_over(self) -> KVOp | None:
        """Let the only generation left compute its tokens again in an empty cache, where it is known to fit.

        None when it did so before: then it does not fit after all.
        """
        generation = self.running[0]
        if generation.started_over or generation.slot is None:
            return None
        generation.started_over = True
        return self.cache.forget(generation.slot)

    def resync(self, generation: Generation, span: Span, resident: int) -> None:
        """After an aborted step the engine holds the first `resident` tokens, some of `span` among them."""
        assert generation.slot is not None
        if resident > span.start:
            self.cache.extend(generation.slot, span.tokens[: resident - span.start])
        else:
            self.cache.truncate(generation.slot, resident)

    def take_back(self, slot: Slot, length: int) -> tuple[KVOp, ...]:
        """The slot holds its first `length` tokens only: those behind them were guessed wrong."""
        if length == slot.n:
            return ()
        self.cache.truncate(slot, length)
        return (Trim(slot.seq, length),)

    def observe(self, batch: Batch, milliseconds: float) -> None:
        """A step took so long: the measure for the next prompts' chunks, for turns and for drafts."""
        self.pace.observe(batch.n_rows, milliseconds)
        self.turns.spent(milliseconds)
        if batch.n_rows >= FEWEST_ROWS:
            self.cache.tier.thrift.decoding.observe(batch.n_rows, milliseconds / 1000)
        if self.speculation is not None and batch.n_rows == len(batch.parts) + batch.n_drafts:
            self.speculation.observe(batch.n_rows, milliseconds)

    def _lend(self, generation: Generation) -> Loan:
        job = generation.command.job
        if job.pin is not None:
            self.cache.unpin(job.pin)  # it must not be in the way of its own session
        fetched = None if self.disk is None else self.disk.take(generation)
        tokens, session = generation.tokens.view, job.request.session
        loan = self.cache.lend(tokens, session, goes_on=generation.is_prefill, kv=generation.kv, fetched=fetched)
        if self.disk is not None and fetched is not None and loan.recalled is fetched:
            self.disk.used(loan.reused)
            self.cache.tier.overflow_was_used()
        return loan

    def _pin(self, generation: Generation, slot: Slot) -> None:
        job = generation.command.job
        if job.pin is not None:
            self.cache.pin(slot, job.pin, job.n_pinned)

    def _should_wait(self, generation: Generation) -> bool:
        """Whether somebody is computing, right now, a prefix that this one could start from."""
        by_checkpoint = self._limits.needs_checkpoints and self.cache.checkpoints.has_room
        computing = [other for other in self.running if not other.is_decoding and other.kv == generation.kv]
        if not (self._limits.can_share or by_checkpoint) or not computing:
            return False
        prompt = generation.tokens.view
        will = max(other.will_checkpoint(prompt) if by_checkpoint else other.will_share(prompt) for other in computing)
        return will >= WORTH_WAITING and will - self.cache.match(prompt, kv=generation.kv)[1] >= WORTH_WAITING

    def _waits_for_disk(self, generation: Generation) -> bool:
        disk, tokens = self.disk, generation.tokens.view
        return disk is not None and disk.is_awaited(generation, lambda: self.cache.kept_of(tokens, generation.kv))

    def _fits(self, generation: Generation) -> bool:
        """Whether the cells suffice for a newcomer beside what the running prompts still need."""
        if not self.running:
            return True
        growing = [(self._still(g), g.tokens.n - (g.cached or 0)) for g in self.running]
        running = sum(g.n_left for g in self.running) + most_cells([*growing, (self._still(generation), 0)])
        if running + generation.tokens.n <= self.cache.cells.free:
            return True
        _, reused = self.cache.match(generation.tokens.view, kv=generation.kv)
        needed = running + generation.tokens.n - reused
        return needed <= self.cache.cells.free or needed <= self.cache.cells.free + self.cache.evictable

    def _still(self, generation: Generation) -> int:
        return self._lengths.still(generation.n_sampled, generation.room)

    def _least_rows(self) -> int:
        return max(1, sum(g.is_decoding for g in self.running)) if self.running else 0


def _chunks(prefilling: list[Generation], budget: int, *, cuts: bool) -> list[tuple[Generation, int]]:
    """`cuts`: prompts are cut where a checkpoint may be taken."""
    chunks = []
    for generation in sorted(prefilling, key=_urgency):
        n = min(generation.n_ahead if cuts else generation.n_left, budget)
        if n <= 0:
            break
        chunks.append((generation, n))
        budget -= n
    return chunks


def _urgency(generation: Generation) -> tuple[bool, int, int]:
    return generation.passed_over < PATIENCE, generation.n_left, generation.order


def _span(generation: Generation, n: int) -> Span:
    slot = generation.slot
    assert slot is not None
    start = slot.tokens.n
    end = start + n
    output = end == generation.tokens.n and not generation.is_prefill
    return Span(slot.seq, start, generation.tokens.part(start, end), output)
