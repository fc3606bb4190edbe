"""Shadows: second sequences that hold the same cells as the first ones, so that none of them is given up.

A sliding window leaves cells behind that no later token attends to. With swa_full they are to be kept, for those who
go back or share them. Yet llama.cpp takes them when it looks for room (`find_slot`, 0.3.36): it starts where
something was cut off and stops at the first cell that is empty or that a window has left, even while others are
empty. It passes over cells that two sequences hold.
"""

from __future__ import annotations

from llama_worker._engine.library import Library, Pointer


class Shadows:
    """The shadow of sequence `seq` is `n + seq`. `window`: tokens that a window is wide. The engine's thread."""

    def __init__(self, lib: Library, memory: Pointer, n: int, window: int) -> None:
        self._short, self._memory, self._n = lib.short, memory, n
        # To follow takes a look at each cell, so it is done now and then: long before a window has left anything.
        self._step = window // 4
        self._held = [0] * n

    def follow(self, seq: int, end: int) -> None:
        """`seq` holds `end` tokens now."""
        held = self._held[seq]
        if end - held > self._step:
            self._short.llama_memory_seq_cp(self._memory, seq, self._n + seq, held, end)
            self._held[seq] = end

    def cut(self, seq: int, start: int) -> None:
        """What `seq` held from `start` on was removed."""
        if start < self._held[seq]:
            self._short.llama_memory_seq_rm(self._memory, self._n + seq, start, -1)
            self._held[seq] = start
