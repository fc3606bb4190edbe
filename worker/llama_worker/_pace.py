"""Pace: how many prompt rows fit into a step while somebody waits for the next token."""

from __future__ import annotations

FEWEST_ROWS = 16
"""A step carries at least so many prompt rows, or a long prompt would never get through."""

FIRST_GUESS = 64
_MEMORY = 0.2  # weight of the newest observation


class Pace:
    """A running estimate of the time per row. Pure: the clock is read by the loop."""

    def __init__(self, budget_ms: float) -> None:
        self.budget_ms = budget_ms
        self._row_ms: float | None = None

    def observe(self, n_rows: int, milliseconds: float) -> None:
        """A step of `n_rows` took so long. Small steps say little about prompts and are not counted."""
        if n_rows < FEWEST_ROWS:
            return
        row = milliseconds / n_rows
        self._row_ms = row if self._row_ms is None else self._row_ms + _MEMORY * (row - self._row_ms)

    def rows(self) -> int:
        if self._row_ms is None:
            return FIRST_GUESS
        return max(FEWEST_ROWS, int(self.budget_ms / max(self._row_ms, 1e-6)))
