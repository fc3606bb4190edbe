"""Foresight: how many cells those who run will need at most at one time, as far as replies are foreseeable.

max_tokens says how long a reply may be, and most are far shorter: to reserve all of it would keep others waiting
beside empty cells. To reserve nothing would let everybody in and then take slots away again. So a reply is
expected to be as long as replies were lately; who ends gives cells back before the others have come to their ends.
"""

from __future__ import annotations

from collections.abc import Iterable

LEAST = 32
"""Cells that every reply should find, so that a newcomer is not preempted at once."""

_MEMORY = 0.2  # weight of the newest reply


class ReplyLengths:
    """How long replies are, by those that ended lately. The worker thread's."""

    def __init__(self) -> None:
        self._mean = 0.0

    def ended(self, n_tokens: int) -> None:
        """A reply of `n_tokens` has ended."""
        self._mean += _MEMORY * (n_tokens - self._mean)

    def still(self, n_sampled: int, room: int) -> int:
        """Tokens that a reply of `n_sampled`, which may have `room` more, is expected to add."""
        return min(room, max(LEAST, round(self._mean) - n_sampled))


def most_cells(growing: Iterable[tuple[int, int]]) -> int:
    """The most cells that sequences take at one time, beyond those that they hold now.

    `growing`: for each the tokens that it will add, one a step, and the cells that it gives back at its end besides.
    """
    ordered = sorted(growing)
    level = most = before = 0
    for i, (tokens, held) in enumerate(ordered):
        level += (tokens - before) * (len(ordered) - i)
        most = max(most, level)
        level -= tokens + held
        before = tokens
    return most
