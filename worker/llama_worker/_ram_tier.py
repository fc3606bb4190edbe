"""RamTier: sequences that lost their cells, kept as bytes until somebody begins with the same tokens.

Cells and slots are few, agents are many. What eviction or preemption takes away is saved whole before, with
the checkpoints that it has, and found again by its longest common prefix with a prompt. It takes a copy to
come back, not a prefill.

The tier and the checkpoints share one budget of bytes; checkpoints come first. The entry that was used longest
ago goes first: to the disk, where there is one. Whether copies pay at all is learnt from what becomes of them (see
`_thrift`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from llama_worker._checkpoints import Checkpoints
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._identity import BASE, KVIdentity
from llama_worker._thrift import Thrift
from llama_worker._tokens import TokenIds, common_prefix

MOST = 256
"""Entries: all are looked at for each prompt."""


@dataclass(frozen=True, slots=True)
class TierCounts:
    """What the tier was good for. Replaced as a whole: any thread may look."""

    saved: int = 0
    dropped: int = 0
    hits: int = 0
    restored_tokens: int = 0


class Overflow(Protocol):
    """Where sequences go that RAM does not keep."""

    def wants(self, tokens: TokenIds, kv: KVIdentity) -> bool: ...

    def keep(self, entry: Entry) -> None: ...


class RamTier:
    """The saved sequences of one context. The worker thread's.

    `can_trim`: a restored sequence can be cut to any length; otherwise to its checkpoints.
    """

    def __init__(self, budget: int, checkpoints: Checkpoints, *, can_trim: bool) -> None:
        self.entries: list[Entry] = []
        self.n_bytes = 0
        self.counts = TierCounts()
        self.overflow: Overflow | None = None
        self.thrift = Thrift()
        self._budget, self._checkpoints = budget, checkpoints
        self._can_trim = can_trim
        self._bytes_of_token = 0.0

    @property
    def budget(self) -> int:
        """Bytes that all entries together may be now."""
        return max(0, self._budget - self._checkpoints.n_bytes)

    @property
    def own_bytes(self) -> int:
        """Of `n_bytes` those that no slot holds too: a checkpoint is counted once, and not if one does. Any thread."""
        entries = self.entries
        shared = [checkpoint for entry in entries for checkpoint in entry.checkpoints]
        own = {checkpoint for checkpoint in shared if not checkpoint.holders}
        n_bytes = sum(entry.n_bytes for entry in entries)
        return n_bytes - sum(c.state.nbytes for c in shared) + sum(c.state.nbytes for c in own)

    def wants(self, tokens: TokenIds, kv: KVIdentity = BASE) -> bool:
        """Whether to save a sequence of `tokens`: it is long, fits, and is not here already."""
        budget, same = self.budget, [entry for entry in self.entries if entry.kv == kv]
        if len(tokens) < WORTH_SAVING or any(entry.leads_to_all(tokens, can_trim=self._can_trim) for entry in same):
            return False
        if budget and len(tokens) * self._bytes_of_token <= budget:
            return True
        return self.overflow is not None and self.overflow.wants(tokens, kv)

    def takes(self, entry: Entry) -> bool:
        """Whether `entry` could be kept, be it for all others."""
        return entry.n_bytes <= self.budget

    def put(self, entry: Entry) -> None:
        """Keep `entry`. A beginning of it that it leads back to is here no longer; the oldest make room."""
        self._bytes_of_token = entry.state.nbytes / entry.n
        if not self.takes(entry):
            self._gone(entry)
            return
        self._keep([*(old for old in self.entries if not self._replaces(entry, old)), entry])
        self.counts = replace(self.counts, saved=self.counts.saved + 1)
        self.fit()

    def fit(self) -> None:
        """Drop the oldest until the budget holds."""
        while self.n_bytes > self.budget or len(self.entries) > MOST:
            oldest = min(self.entries, key=lambda entry: entry.last_used)
            self._keep([entry for entry in self.entries if entry is not oldest])
            self._gone(oldest)

    def find(self, prompt: TokenIds, kv: KVIdentity = BASE) -> tuple[Entry | None, int]:
        """The entry of `kv` that leads to the longest beginning of `prompt`, and its length: at most all but one."""
        best, longest, most = None, 0, len(prompt) - 1
        for entry in self.entries:
            if longest >= min(entry.n, most) or entry.tokens[longest] != prompt[longest] or entry.kv != kv:
                continue  # most are told apart by one token: there may be hundreds
            length = self.leads_to(entry, prompt)
            if length > longest:
                best, longest = entry, length
        return best, longest

    def leads_to(self, entry: Entry, prompt: TokenIds) -> int:
        """How many of the first tokens of `prompt` can be had from `entry`; at most len(prompt) - 1."""
        common = min(common_prefix(entry.tokens, prompt), len(prompt) - 1)
        return entry.reachable(common, can_trim=self._can_trim)

    def used(self, entry: Entry, n_tokens: int, now: int) -> None:
        entry.last_used = now
        entry.n_hits += 1
        if entry.continued is not None:
            self.thrift.asked_for(continued=entry.continued)
        counts = self.counts
        self.counts = replace(counts, hits=counts.hits + 1, restored_tokens=counts.restored_tokens + n_tokens)

    def overflow_was_used(self) -> None:
        """What had gone from here came back: it was not copied in vain. Of which kind it was, nobody knows any more."""
        for continued in (False, True):
            self.thrift.asked_for(continued=continued)

    def check(self) -> None:
        """Assert that the bytes add up and are within the budget."""
        assert self.n_bytes == sum(entry.n_bytes for entry in self.entries), "bytes of entries differ"
        assert self.n_bytes <= self.budget, f"{self.n_bytes} bytes of entries"

    def _replaces(self, entry: Entry, old: Entry) -> bool:
        return entry.kv == old.kv and entry.leads_to_all(old.tokens, can_trim=self._can_trim)

    def _gone(self, entry: Entry) -> None:
        self.counts = replace(self.counts, dropped=self.counts.dropped + 1)
        if entry.continued is not None and not entry.n_hits:
            self.thrift.in_vain(continued=entry.continued)
        if self.overflow is not None:
            self.overflow.keep(entry)

    def _keep(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.n_bytes = sum(entry.n_bytes for entry in entries)
