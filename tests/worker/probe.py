"""Probe: an engine that writes down what it computes, and can be given a fault of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np

from llama_worker import ModelConfig, SamplingParams
from llama_worker._engine.base import (
    DecodeStatus,
    Engine,
    Floats,
    LoadedModel,
    Loader,
    Mask,
    Sampler,
    SavedState,
    Span,
    TokenIds,
)
from llama_worker._identity import KVIdentity

Mistake: TypeAlias = Literal[
    "other row", "shifted span", "shifted after abort", "shifted after restore", "late adapters"
]


class Probe:
    """Wraps an Engine; `logits_of` keeps, for each sampler, the logits that each token was sampled from, and `rows`
    how many rows each decode had.

    `mistake` makes it err by one: it samples from a neighbour's row, decodes the second span of a
    prompt (or the first after an abort, or a restored state) one token late, or changes adapters one decode late.
    """

    def __init__(self, inner: Engine, mistake: Mistake | None = None) -> None:
        self.inner = inner
        self.mistake = mistake
        self.logits_of: dict[int, list[Floats]] = {}
        self.chosen: dict[int, list[int]] = {}
        self.samplers: list[Sampler] = []
        self.prompts: list[TokenIds] = []
        self.rows: list[int] = []
        self.abort_next = False
        self.n_aborted = 0
        self.n_restored = 0
        self.most_outputs = 0
        self._outputs: list[int] = []
        self._erred = False
        self._due: KVIdentity | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, spans: Sequence[Span]) -> DecodeStatus:
        self.most_outputs = max(self.most_outputs, sum(span.output for span in spans))
        self.rows.append(sum(len(span.tokens) for span in spans))
        if self.abort_next:
            self.abort_next = False
            self.inner.abort_flag.raise_()
            self.n_aborted += 1
            return self.inner.decode(spans)
        ends = np.cumsum([len(span.tokens) for span in spans])
        self._outputs = [row for end, span in zip(ends, spans, strict=True) for row in range(end - span.output, end)]
        status = self.inner.decode([self._shifted(span) for span in spans])
        if self._due is not None:
            self._adapters.use(self._due)
            self._due = None
        return status

    def use_loras(self, kv: KVIdentity) -> bool:
        former: KVIdentity = self.inner._generator.kv if self.mistake == "late adapters" else kv  # type: ignore[attr-defined]
        switched = self.inner.use_loras(kv)
        if switched and former != kv:
            self._due = kv
            self._adapters.use(former)
        return switched

    @property
    def _adapters(self) -> Any:
        """Below the engine's own books, which would notice."""
        return self.inner._loras  # type: ignore[attr-defined]

    def sample(self, row: int, sampler: Sampler, mask: Mask | None = None) -> int:
        if self.mistake == "other row":
            row = self._outputs[self._outputs.index(row) - 1]
        self.logits_of.setdefault(id(sampler), []).append(self.inner.logits(row).copy())
        token = self.inner.sample(row, sampler, mask)
        self.chosen.setdefault(id(sampler), []).append(token)
        return token

    def new_sampler(self, params: SamplingParams, history: TokenIds) -> Sampler:
        sampler = self.inner.new_sampler(params, history)
        self.samplers.append(sampler)
        self.prompts.append(history)
        return sampler

    def answer(self, prompt: TokenIds) -> tuple[list[int], list[Floats]]:
        """The tokens that were sampled for this very `prompt` (the array itself) so far, and the logits of each."""
        keys = [id(sampler) for sampler, of in zip(self.samplers, self.prompts, strict=True) if of is prompt]
        return self.chosen.get(keys[0], []) if keys else [], self.logits_of.get(keys[0], []) if keys else []

    def seq_restore(self, seq: int, state: SavedState | bytes, length: int, *, donor: int | None = None) -> None:
        self.inner.seq_restore(seq, state, length, donor=donor)
        self.n_restored += 1

    def _shifted(self, span: Span) -> Span:
        due = self.mistake == "shifted span" or (self.mistake == "shifted after abort" and self.n_aborted)
        due = due or (self.mistake == "shifted after restore" and self.n_restored)
        if due and not self._erred and span.start > 0 and len(span.tokens) > 1:
            self._erred = True
            return span._replace(tokens=np.concatenate([span.tokens[1:], span.tokens[-1:]]))
        return span


def probed(loader: Loader, probes: list[Probe], mistake: Mistake | None = None) -> Loader:
    """`loader` with a Probe around each engine, which is put into `probes`."""

    def load(config: ModelConfig) -> LoadedModel:
        loaded = loader(config)
        probes.append(Probe(loaded.engine, mistake))
        return replace(loaded, engine=probes[-1])  # type: ignore[arg-type]

    return load
