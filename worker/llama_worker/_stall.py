"""StallWatch: which readers have stopped reading. Decisions only; the clock is read by the loop."""

from __future__ import annotations

from collections.abc import Sequence

from llama_worker._generation import Generation


class StallWatch:
    """Remembers when each reader was last seen to take an event, between two looks. The worker thread's.

    `timeout` is in seconds. A reader for whom nothing waits is never stalled, however long the model takes.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._seen: dict[Generation, tuple[int, float]] = {}

    def look(self, generations: Sequence[Generation], now: float) -> list[Generation]:
        """Those whose reader has taken nothing for `timeout` seconds although events waited for it."""
        former, self._seen = self._seen, {}
        for generation in generations:
            taken = generation.command.sink.taken_while_waiting()
            if taken is not None:
                last = former.get(generation)
                self._seen[generation] = last if last is not None and last[0] == taken else (taken, now)
        return [generation for generation, (_, since) in self._seen.items() if now - since >= self.timeout]
