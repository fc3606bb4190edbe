"""Turns: which of the running generations may share the next batch, when they use different adapters.

One decode computes all its rows with one set of adapters, and changing the set costs a good part of a token
(measured: 4 to 5 ms where a token takes 12), for llama.cpp plans its graph anew. So the sets take turns of several
steps: the one that has waited longest comes next, and a new one waits behind those that are there. With at most as
many sets as slots, each comes within as many turns.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_worker._generation import Generation
from llama_worker._identity import BASE, KVIdentity
from llama_worker._pace import Pace

MOST_STEPS = 16
"""Steps of one turn, if they take no longer together than one step may beside somebody who is decoding."""


class Turns:
    """Whose turn it is. Changed by `spent` and `served` only, so a batch may be planned again. The worker thread's."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._now: KVIdentity = BASE
        self._steps = 0  # of this turn; 0: it is over
        self._milliseconds = self._of_last_step = 0.0
        self._tick = 0
        self._since: dict[KVIdentity, int] = {}  # since when each set that is running has been waiting

    def members(self, running: Sequence[Generation]) -> Sequence[Generation]:
        """Those of `running` who may be in the next batch: all of them, if all use the same adapters."""
        if not running:
            return running
        first = running[0].kv
        if all(generation.kv == first for generation in running):
            return running
        chosen = self._next({generation.kv for generation in running})
        return [generation for generation in running if generation.kv == chosen]

    def spent(self, milliseconds: float) -> None:
        """The step took so long; who had it is said next."""
        self._of_last_step = milliseconds

    def served(self, kv: KVIdentity, running: Sequence[Generation]) -> None:
        """The generations of `kv` had a step; these are running."""
        self._tick += 1
        if kv != self._now:
            self._now, self._steps, self._milliseconds = kv, 0, 0.0
        self._steps += 1
        self._milliseconds += self._of_last_step
        self._since = {g.kv: self._since.get(g.kv, self._tick) for g in running}
        if self._steps >= MOST_STEPS or self._milliseconds >= self._pace.budget_ms:
            self._tick += 1  # behind everybody who is there
            self._since[kv] = self._tick
            self._steps, self._milliseconds = 0, 0.0

    def _next(self, present: set[KVIdentity]) -> KVIdentity:
        if self._steps and self._now in present:
            return self._now
        return min(present, key=lambda kv: (self._since.get(kv, self._tick + 1), kv.loras))
