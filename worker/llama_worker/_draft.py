"""Draft model: a second, small model that guesses what the first will say.

It says what it holds most likely, token by token, behind the same text. What comes of a guess is decided as for any
other (see `_speculation`). Its KV cache is its own: a sequence for each slot, brought up to date when somebody
speaks there, so many rows at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import numpy as np

from llama_worker._engine.base import MOST_DRAFTS, DecodeStatus, Engine, Span
from llama_worker._errors import GenerationError
from llama_worker._requests import SamplingParams
from llama_worker._tokens import TokenBuffer, TokenIds, common_prefix

_GREEDY: Final = SamplingParams(temperature=0.0)
_NOTHING: Final[TokenIds] = np.empty(0, np.int32)
_PATIENCE: Final = 256
"""Calls for which a text is left out that found no room."""


def _nothing() -> None:
    pass


class DraftModel:
    """Guesses with `engine`, which can be trimmed, for a model of `n_vocab` tokens. The worker thread's.

    `ends`: tokens that end a reply. `token_ms`: what the last call took for a token of everybody's; None when it
    had more to compute than that.
    """

    def __init__(
        self, engine: Engine, ends: Collection[int], n_vocab: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.engine = engine
        self.token_ms: float | None = None
        self._ends, self._n_vocab, self._clock = ends, n_vocab, clock
        self._sampler = engine.new_sampler(_GREEDY, _NOTHING)
        self._held = [TokenBuffer() for _ in range(engine.limits.n_seq)]
        self._left_out: dict[int, int] = {}  # sequences without room, and until which call
        self._n_calls = 0
        self._speaking: frozenset[int] = frozenset()

    def can_guess(self, seq: int, n_tokens: int) -> bool:
        """Whether a text of so many tokens fits, and its sequence found room lately."""
        return n_tokens < self.engine.limits.n_ctx and self._left_out.get(seq, 0) <= self._n_calls

    def guess(
        self,
        texts: Sequence[tuple[int, TokenIds]],
        n: int,
        most_rows: int,
        between: Callable[[], None] = _nothing,
    ) -> list[TokenIds]:
        """What may follow each of `texts`, which are sequences with all their tokens: `n` tokens, less at an end.

        Blocks. Where more than `most_rows` rows of all texts are new, as many are computed now, and there is no guess
        for who is not up to date; nor for who finds no room, and in a call that is aborted. `between` is called
        before each decode but the first. Raises GenerationError when the engine fails.
        """
        self._n_calls += 1
        self._speaking = frozenset(seq for seq, _ in texts)
        guesses: list[list[int]] = [[] for _ in texts]
        missing = self._missing(texts, min(most_rows, self.engine.limits.n_ubatch))
        began = self._clock()
        rows = self._decoded(missing)
        while rows:
            said = {i: self.engine.sample(row, self._sampler) for i, row in rows.items()}
            known = {i: token for i, token in said.items() if token < self._n_vocab}
            for i, token in known.items():
                guesses[i].append(token)
            going = [i for i, token in known.items() if len(guesses[i]) < n and token not in self._ends]
            if going:
                between()
            rows = self._decoded({i: self._next(texts[i][0], guesses[i][-1]) for i in going})
        self._note(missing, max(map(len, guesses), default=0), (self._clock() - began) * 1000)
        return [np.array(guess, np.int32) for guess in guesses]

    def close(self) -> None:
        """Let the engine go."""
        self._sampler.close()
        self.engine.close()

    def _note(self, missing: Mapping[int, Span], n: int, milliseconds: float) -> None:
        is_usual = n and all(len(span.tokens) <= 1 + MOST_DRAFTS for span in missing.values())
        self.token_ms = milliseconds / n if is_usual else None

    def _missing(self, texts: Sequence[tuple[int, TokenIds]], room: int) -> dict[int, Span]:
        """By the place in `texts`, what is not computed yet, as far as there is room."""
        spans = {}
        for i, (seq, tokens) in enumerate(texts):
            if not self.can_guess(seq, len(tokens)):
                continue
            start = self._go_back(seq, tokens)
            part = tokens[start : start + room]
            if len(part) and int(part.max()) < self.engine.limits.n_vocab:
                spans[i] = Span(seq, start, part, start + len(part) == len(tokens))
                room -= len(part)
        return spans

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
        for seq, start, *_ in spans.values():
            is_there = status is DecodeStatus.ABORTED and self.engine.seq_end(seq) >= start
            if not is_there or not self.engine.seq_trim(seq, start):
                self._forget(seq)
        if status is not DecodeStatus.ABORTED:
            raise GenerationError(f"llama_decode of the draft model returned {int(status)} ({status.name.lower()})")

    def _forget(self, seq: int) -> None:
        self.engine.seq_clear(seq)
        self._held[seq].truncate(0)
