"""Sequences: what each sequence of a context holds.

llama.cpp answers a sequence id out of range with abort(), and computes on from whatever is there: a state that is
half updated, a window that lost cells, cells of other adapters. So what each holds is known here, and every call is
checked before C is reached.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llama_worker._engine.base import DecodeStatus, SavedState, Span, StateError
from llama_worker._engine.library import Library, Pointer
from llama_worker._engine.shadows import Shadows
from llama_worker._engine.state import ContextStates
from llama_worker._identity import BASE


class Sequences:
    """The `n` sequences of one context: their lengths (`ends`), and what each was computed with (`marks`).

    The engine's thread. `base.Engine` says what its calls mean; what a memory can do is False until it has shown it.
    With `has_shadows` there are as many behind them, see `Shadows`.
    """

    def __init__(
        self, lib: Library, context: Pointer, memory: Pointer, n: int, window: int, mark: bytes, *, has_shadows: bool
    ) -> None:
        self._short, self._memory = lib.short, memory
        self._shadows = Shadows(lib, memory, n, window) if has_shadows else None
        self._states = ContextStates(lib, context, mark)
        self._window = window
        self._spoiled: dict[int, int] = {}  # sequences without a valid state, and how many tokens' other cells are
        self.n = n
        self.ends = [0] * n
        self.marks = [BASE.mark] * n
        self.can_trim = self.can_trim_anywhere = self.can_trim_restored = False
        self.can_share = self.can_save = self.needs_checkpoints = False

    def end(self, seq: int) -> int:
        self.check(seq)
        return self.ends[seq]

    def trim(self, seq: int, length: int) -> bool:
        self.check(seq)
        end = self.ends[seq]
        if not 0 <= length <= end:
            raise ValueError(f"length={length}: sequence {seq} holds {end} tokens")
        if length == end:
            return True
        if length == 0:
            self.clear(seq)
            return True
        if not self.can_trim or not self._window_holds(seq, length):
            return False
        if not self.remove(seq, length):
            return False
        self.ends[seq] = length
        return True

    def clear(self, seq: int) -> None:
        self.check(seq)
        self._clear(seq)

    def clear_spoiled(self, spans: Sequence[Span]) -> None:
        """Before `spans` are computed: they begin anew where nothing valid is left."""
        for seq in [span.seq for span in spans if span.seq in self._spoiled] if self._spoiled else ():
            self._clear(seq)

    def advance(self, spans: Sequence[Span], ends: list[int]) -> None:
        """`spans` were computed: now each sequence holds as many tokens as `ends` says."""
        self.ends = ends
        if self._shadows is not None:
            for span in spans:
                self._grow(span.seq, ends[span.seq])

    def wipe(self) -> None:
        """As if nothing had ever been computed."""
        self.clear(0)
        self._short.llama_memory_clear(self._memory, True)

    def share(self, source: int, target: int, length: int) -> None:
        self.check(source)
        self.check(target)
        if not self.can_share:
            raise ValueError("this model cannot share a prefix (limits.can_share)")
        if source == target or self.ends[target]:
            raise ValueError(f"target={target}: must be another sequence and empty, it holds {self.ends[target]}")
        if not 0 < length <= self.ends[source]:
            raise ValueError(f"length={length}: sequence {source} holds {self.ends[source]} tokens")
        if not self._window_holds(source, length):
            raise StateError(f"sequence {source} lacks the window behind its first {length} tokens")
        self._short.llama_memory_seq_cp(self._memory, source, target, 0, length)
        self._grow(target, length)
        self.marks[target] = self.marks[source]

    def save(self, seq: int, *, partial: bool) -> SavedState:
        self.check(seq)
        if (partial and not self.needs_checkpoints) or not self.can_save:
            raise ValueError("this model has no such states (limits.can_save, limits.needs_checkpoints)")
        if not self.ends[seq]:
            raise ValueError(f"seq={seq}: it is empty")
        return self._states.save(seq, self.ends[seq], partial=partial, kv=self.marks[seq])

    def restore(self, seq: int, state: SavedState | bytes, length: int, donor: int | None) -> None:
        self.check(seq)
        if donor is not None:
            self.check(donor)
            if donor == seq or self.ends[seq]:
                raise ValueError(f"seq={seq}: must be another than the donor and empty, it holds {self.ends[seq]}")
        try:
            self._restore(seq, state, length, donor)
        except StateError:
            self.clear(seq)
            raise

    def resync(self, spans: Sequence[Span], code: int) -> None:
        """Learn what a failed decode left. KV_FULL and INVALID leave everything as it was."""
        if code in (DecodeStatus.KV_FULL, DecodeStatus.INVALID):
            return
        decoded = {span.seq for span in spans}
        for seq in decoded:
            before = self.ends[seq]
            self._grow(seq, self._short.llama_memory_seq_pos_max(self._memory, seq) + 1)
            # A state that was half updated, or a window that lost cells, continues nothing. The cells of what
            # was there before are whole: a checkpoint among them can still be gone back to.
            if not self.can_trim or not self._window_holds(seq, self.ends[seq]):
                self.ends[seq] = 0
                self._spoiled[seq] = before
        if len(decoded) > 1 and not self.can_trim:
            self._spoil_others(decoded)

    def check(self, seq: int) -> None:
        """Raises ValueError for an id that llama.cpp would abort for."""
        if not 0 <= seq < self.n:
            raise ValueError(f"seq={seq}: out of range 0 … {self.n - 1}")

    def remove(self, seq: int, start: int) -> bool:
        """Have llama.cpp take away what stands from `start` on, or, from -1, everything. False when it cannot."""
        if not self._short.llama_memory_seq_rm(self._memory, seq, start, -1):
            return False
        if self._shadows is not None:
            self._shadows.cut(seq, max(start, 0))
        return True

    def _grow(self, seq: int, end: int) -> None:
        self.ends[seq] = end
        if self._shadows is not None:
            self._shadows.follow(seq, end)

    def _spoil_others(self, decoded: Collection[int]) -> None:
        """States that are decoded together stand side by side: llama.cpp makes others trade places with them.

        It notes the new places first and moves the states in the graph (0.3.36): after a call that broke off, a
        sequence that had no part in it may find another's state in its place. Nothing says whether it was moved.
        """
        for seq, end in enumerate(self.ends):
            if end and seq not in decoded:
                self.ends[seq] = 0
                self._spoiled[seq] = end

    def _window_holds(self, seq: int, length: int) -> bool:
        """Whether the cells that a token at `length` attends to are all there (sliding windows drop them)."""
        if not self._window:
            return True
        first: int = self._short.llama_memory_seq_pos_min(self._memory, seq)
        return first <= max(0, length - self._window)

    def _restore(self, seq: int, state: SavedState | bytes, length: int, donor: int | None) -> None:
        saved = self._states.open(state)
        if saved.length != length:
            raise StateError(f"the state is of {saved.length} tokens, not of {length}")
        if not saved.partial:
            self.clear(seq)
        elif (self._spoiled.get(seq, self.ends[seq]) if donor is None else self.ends[donor]) < length:
            raise StateError(f"a state of {length} tokens lacks their other cells")
        elif saved.kv != self.marks[seq if donor is None else donor]:
            raise StateError(f"a state of {length} tokens belongs to cells of other adapters")
        elif donor is not None:
            self._short.llama_memory_seq_cp(self._memory, donor, seq, 0, length)
        self._states.load(seq, saved)
        if saved.partial and not self.remove(seq, length):
            raise StateError(f"what follows the {length} tokens could not be removed")
        if self._short.llama_memory_seq_pos_max(self._memory, seq) != length - 1:
            raise StateError(f"the state did not lead back to {length} tokens")
        self._spoiled.pop(seq, None)
        self._grow(seq, length)
        self.marks[seq] = saved.kv

    def _clear(self, seq: int) -> None:
        self.remove(seq, -1)
        self._spoiled.pop(seq, None)
        self.ends[seq] = 0
