"""Draft model: a second, small model that guesses what the first will say.

It says what it holds most likely, token by token, behind the same text. What comes of a guess is decided as for any
other (see `_speculation`). Its KV cache is its own: a sequence for each slot, brought up to date when somebody
speaks there, as many rows at a time as do not keep others waiting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np

from llama_worker._engine.base import DecodeStatus, Engine, Span
from llama_worker._errors import GenerationError
from llama_worker._requests import SamplingParams
from llama_worker._tokens import TokenBuffer, TokenIds, common_prefix

_GREEDY: Final = SamplingParams(temperature=0.0)
_NOTHING: Final[TokenIds] = np.empty(0, np.int32)
_PATIENCE: Final = 256
"""Calls for which a text is left out that found no room."""


class DraftModel:
    """Guesses with `engine`, which can be trimmed. `ends`: tokens that end a reply. The worker thread's.

    `has_failed`: it is asked no more.
    """

    def __init__(self, engine: Engine, ends: Collection[int]) -> None:
        self.engine = engine
        self.has_failed = False
        self._ends = ends
        self._sampler = engine.new_sampler(_GREEDY, _NOTHING)
        self._held = [TokenBuffer() for _ in range(engine.limits.n_seq)]
        self._left_out: dict[int, int] = {}  # sequences without room, and until which call
        self._n_calls = 0
        self._speaking: frozenset[int] = frozenset()

    def guess(self, texts: Sequence[tuple[int, TokenIds]], n: int, most_rows: int) -> list[TokenIds]:
        """What may follow each of `texts`, which are sequences with all their tokens: `n` tokens, less at an end.

        Blocks. Where more than `most_rows` rows of all texts are new, as many are computed now, and there is no guess
        for who is not up to date; nor for who finds no room, and in a call that is aborted. Raises GenerationError
        when the engine fails.
        """
        self._n_calls += 1
        self._speaking = frozenset(seq for seq, _ in texts)
        guesses: list[list[int]] = [[] for _ in texts]
        rows = self._decoded(self._missing(texts, min(most_rows, self.engine.limits.n_ubatch)))
        while rows:
            for i, row in rows.items():
                guesses[i].append(self.engine.sample(row, self._sampler))
            going = [i for i in rows if len(guesses[i]) < n and guesses[i][-1] not in self._ends]
            rows = self._decoded({i: self._next(texts[i][0], guesses[i][-1]) for i in going})
        return [np.array(guess, np.int32) for guess in guesses]

    def close(self) -> None:
        """Let the engine go."""
        self._sampler.close()
        self.engine.close()

    def _missing(self, texts: Sequence[tuple[int, TokenIds]], room: int) -> dict[int, Span]:
        """By the place in `texts`, what is not computed yet, as far as there is room."""
        spans = {}
        for i, (seq, tokens) in enumerate(texts):
            start = self._go_back(seq, tokens)
            part = tokens[start : start + room]
            if len(part) and self._can_hold(seq, tokens, part):
                spans[i] = Span(seq, start, part, start + len(part) == len(tokens))
                room -= len(part)
        return spans

    def _can_hold(self, seq: int, tokens: TokenIds, part: TokenIds) -> bool:
        limits = self.engine.limits
        is_in = self._left_out.get(seq, 0) < self._n_calls
        return is_in and len(tokens) < limits.n_ctx and int(part.max()) < limits.n_vocab

    def _go_back(self, seq: int, tokens: TokenIds) -> int:
        """Keep what `tokens` begin with, all but the last; its length."""
        held = self._held[seq]
        length = min(common_prefix(held.view, tokens), len(tokens) - 1)
        if length < held.n and not self.engine.seq_trim(seq, length):
            length = 0
            self.engine.seq_clear(seq)
        held.truncate(length)
        return length

    def _next(self, seq: int, token: int) -> Span:
        return Span(seq, self._held[seq].n, np.array([token], np.int32), True)

    def _decoded(self, spans: Mapping[int, Span]) -> dict[int, int]:
        """Decode `spans`; the rows of those that have logits. None when there was no room, or it was aborted."""
        if not spans:
            return {}
        status = self.engine.decode(list(spans.values()))
        if status is DecodeStatus.KV_FULL and self._has_made_room():
            status = self.engine.decode(list(spans.values()))
        if status is not DecodeStatus.OK:
            self._resync(spans, status)
            return {}
        rows, last = {}, -1
        for i, span in spans.items():
            self._held[span.seq].extend(span.tokens)
            last += len(span.tokens)
            if span.output:
                rows[i] = last
        return rows

    def _has_made_room(self) -> bool:
        """Forget the sequences of those who do not speak now. Whether there were any."""
        idle = [seq for seq, held in enumerate(self._held) if held.n and seq not in self._speaking]
        for seq in idle:
            self._forget(seq)
        return bool(idle)

    def _resync(self, spans: Mapping[int, Span], status: DecodeStatus) -> None:
        """After a decode that was not: know what is still there."""
        if status is DecodeStatus.KV_FULL:
            longest = max((span.seq for span in spans.values()), key=lambda seq: self._held[seq].n)
            self._left_out[longest] = self._n_calls + _PATIENCE
            self._forget(longest)
            return
        for span in spans.values():
            if status is not DecodeStatus.ABORTED or not self.engine.seq_trim(span.seq, span.start):
                self._forget(span.seq)
        if status is not DecodeStatus.ABORTED:
            raise GenerationError(f"llama_decode of the draft model returned {int(status)} ({status.name.lower()})")

    def _forget(self, seq: int) -> None:
        self.engine.seq_clear(seq)
        self._held[seq].truncate(0)
