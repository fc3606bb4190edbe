"""Scoring answers by a cold engine: how far what was computed with a cache is from what a fresh one computes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_worker import ModelConfig
from llama_worker._engine.base import DecodeStatus, Floats, Span, TokenIds
from llama_worker._engine.llama import load
from llama_worker._identity import BASE, KVIdentity


@dataclass(frozen=True, slots=True)
class Score:
    """Over the tokens of one or several answers, the worst: `difference` of any logit, and `regret`, by how much the
    emitted token's logit falls short of the best that does not end the reply; both as a cold pass sees it."""

    difference: float = 0.0
    regret: float = 0.0

    def worse(self, other: Score) -> Score:
        return Score(max(self.difference, other.difference), max(self.regret, other.regret))


def worst_of(scores: Iterable[Score]) -> Score:
    return functools.reduce(Score.worse, scores, Score())


class Cold:
    """An engine that computes every answer from an empty cache, for requests with `ignore_eos`. Close it in the end.

    `kv`: with which of its `adapters`, which are files.
    """

    def __init__(self, model: Path, adapters: Iterable[Path] = (), **config: object) -> None:
        settings = {"n_ctx": 8192, "n_parallel": 1, "n_threads": 1, **config}
        loaded = load(ModelConfig(model=str(model), **settings))  # type: ignore[arg-type]
        self._engine, self._ends = loaded.engine, list(loaded.vocabulary.end_tokens)
        for path in adapters:
            self._engine.load_lora(str(path))

    def score(self, prompt: TokenIds, emitted: Sequence[int], logits: Sequence[Floats], kv: KVIdentity = BASE) -> Score:
        """`logits[i]` are what `emitted[i]` was sampled from. Looks at the first, the middle one and the last."""
        self._begin(kv)
        tokens, position, worst = np.append(prompt, np.array(emitted, np.int32)), 0, Score()
        for i in sorted({0, len(emitted) // 2, len(emitted) - 1}) if emitted else ():
            end = len(prompt) + i
            cold = self._decoded(tokens[position:end], position)
            position = end
            difference = float(np.abs(cold - logits[i]).max())
            worst = worst.worse(Score(difference, float(np.delete(cold, self._ends).max() - cold[emitted[i]])))
        return worst

    def reply(self, prompt: TokenIds, n: int, kv: KVIdentity = BASE) -> list[int]:
        """The `n` tokens that follow, each the likeliest one."""
        self._begin(kv)
        said, row = list[int](), self._decoded(prompt, 0)
        while len(said) < n:
            row[self._ends] = -np.inf
            said.append(int(row.argmax()))
            row = self._decoded(np.array(said[-1:], np.int32), len(prompt) + len(said) - 1)
        return said

    def _begin(self, kv: KVIdentity) -> None:
        self._engine.seq_clear(0)
        self._engine.use_loras(kv)

    def _decoded(self, tokens: TokenIds, start: int) -> Floats:
        engine = self._engine
        for at in range(0, len(tokens), engine.limits.n_batch):
            part = tokens[at : at + engine.limits.n_batch]
            span = Span(0, start + at, part, at + len(part) == len(tokens))
            assert engine.decode([span]) is DecodeStatus.OK
        return engine.logits(len(part) - 1).copy()

    def close(self) -> None:
        self._engine.close()
