"""Thrift: whether copying a sequence away pays, learnt from what copies cost and how often they are asked for.

    chance that it is asked for × (time to decode it - time to copy it back)  >  time to copy it away

With more sessions than fit, each in turn, what is saved is dropped before it is asked for: then copying is all cost.
Now and then one is saved nevertheless, for times change. Sequences that were continued before and those that never
were are judged apart, for a flood of single questions says nothing about conversations.
"""

from __future__ import annotations

PROBE = 16
"""Of so many sequences that are not worth saving one is saved, to see."""

_CHANCE_MEMORY = 1 / 32
_TIME_MEMORY = 0.9


class _TimePerToken:
    """Seconds over tokens, both fading: short calls and late waits for a device even out."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def observe(self, n_tokens: int, seconds: float) -> None:
        self._seconds = _TIME_MEMORY * self._seconds + seconds
        self._tokens = _TIME_MEMORY * self._tokens + n_tokens

    @property
    def value(self) -> float:
        """0 when nothing was observed."""
        return self._seconds / self._tokens if self._tokens else 0.0


class Thrift:
    """Judges what to save. Pure: times are measured by the loop. The worker thread's."""

    def __init__(self) -> None:
        self.saving, self.restoring, self.decoding = _TimePerToken(), _TimePerToken(), _TimePerToken()
        self._chance = {False: 1.0, True: 1.0}
        self._refused = 0

    def __repr__(self) -> str:
        return f"<Thrift: asked for {self._chance[False]:.2f}, of those that were continued {self._chance[True]:.2f}>"

    def pays(self, *, continued: bool) -> bool:
        """Whether to save a sequence, which was `continued` before or not. True until the costs are known."""
        if not self.decoding.value or not self.saving.value:
            return True
        spared = self.decoding.value - self.restoring.value
        if self._chance[continued] * spared > self.saving.value:
            return True
        self._refused += 1
        return self._refused % PROBE == 0

    def asked_for(self, *, continued: bool) -> None:
        """What was saved was of use."""
        self._chance[continued] += _CHANCE_MEMORY * (1 - self._chance[continued])

    def in_vain(self, *, continued: bool) -> None:
        """What was saved is dropped, and was never of use."""
        self._chance[continued] -= _CHANCE_MEMORY * self._chance[continued]
