"""Cells: a ledger of KV cells. What the cache is short of is cells, not tokens: a shared prefix has its cells once.

Sequences share cells by prefix only: who holds a cell holds those before it as well. So along a sequence the number
of holders never grows, and where the cells begin that are its own is found by halving.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

CellIds = NDArray[np.int32]


class Cells:
    """Each resident token has a cell, shared prefixes have theirs in common. The worker thread's."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._holders: CellIds = np.zeros(n, np.int32)
        self._unused: CellIds = np.arange(n, dtype=np.int32)[::-1].copy()  # a stack: its first `free` count
        self._free = n

    @property
    def free(self) -> int:
        return self._free

    @property
    def used(self) -> int:
        return self.n - self._free

    def take(self, count: int) -> CellIds:
        """`count` unused cells, now held once. The caller has made sure that there are as many."""
        assert count <= self._free, f"{count} cells asked for, {self._free} free"
        taken = self._unused[self._free - count : self._free].copy()
        self._free -= count
        self._holders[taken] = 1
        return taken

    def take_one(self) -> int:
        assert self._free, "a cell asked for, none free"
        self._free -= 1
        cell = int(self._unused[self._free])
        self._holders[cell] = 1
        return cell

    def hold(self, cells: CellIds) -> None:
        """One more sequence holds `cells`, all different."""
        self._holders[cells] += 1

    def drop(self, cells: CellIds) -> None:
        """One sequence less holds `cells`, all different."""
        self._holders[cells] -= 1
        unheld = cells[self._holders[cells] == 0]
        self._unused[self._free : self._free + len(unheld)] = unheld
        self._free += len(unheld)

    def n_shared(self, cells: CellIds) -> int:
        """How many of a sequence's `cells`, its first ones, others hold too."""
        return bisect_left(cells, True, key=lambda cell: bool(self._holders[cell] == 1))

    def holders(self) -> CellIds:
        """How many sequences hold each cell; a copy."""
        return self._holders.copy()
