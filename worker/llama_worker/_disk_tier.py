"""DiskTier: what leaves RAM, kept in a folder, and who waits for what comes back from it. Decisions only.

The order of search is fixed: a slot, RAM, the disk. A request is held against the disk's index once, when it could
have a slot: the index is in RAM, so that costs no more than looking through the RAM tier. If the disk leads clearly
further than the other two, the file is read by a thread of its own, while others are served, and the request waits
where it is. One file is read at a time, so no more than one state is in memory beyond what was asked for. A disk
that does not answer in time is not waited for, neither by him nor by others until it answers.

What is written was copied out of the context anyway, to RAM, and goes to the disk when it has to leave it. The rest,
what slots hold, is copied when the model is let go. Writing is another thread's work; what it cannot take is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llama_worker._engine.base import TokenIds
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._generation import Generation
from llama_worker._identity import KVIdentity
from llama_worker._shelved import Shelved
from llama_worker._tokens import common_prefix

WORTH_A_SHARE = 8
"""A file is read for at least this part of its tokens: the whole of it has to be read."""

PATIENCE = 5.0
"""Seconds that a request waits for the disk, whoever is before it. A prefill takes as long, if it is worth a file."""

FRESH = 2.0
"""Seconds for which the index need not be brought up to date with what other processes wrote."""


class Reading(Protocol):
    """A file on its way into memory. When `is_done`, `entry` is what it held, None if that is of no use."""

    @property
    def is_done(self) -> bool: ...
    @property
    def entry(self) -> Entry | None: ...


class Shelf(Protocol):
    """The folder behind the tier. No method blocks."""

    @property
    def is_opening(self) -> bool:
        """Whether the index is about to be there; False also where that will take long."""
        ...

    @property
    def index(self) -> Sequence[Shelved]: ...

    def read(self, shelved: Shelved) -> Reading: ...

    def write(self, entry: Entry) -> None:
        """Keep `entry`, if there is room in the line."""

    def refresh(self) -> None:
        """Look what others have written."""


@dataclass(frozen=True, slots=True)
class DiskHits:
    """Replaced as a whole: any thread may look. `restored_tokens` came back in `hits` files."""

    hits: int = 0
    restored_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Fetch:
    owner: Generation
    reading: Reading


class DiskTier:
    """The files that a context may use. The worker thread's. `can_trim` as the RAM tier's."""

    def __init__(self, shelf: Shelf, *, can_trim: bool, n_ctx: int, clock: Callable[[], float]) -> None:
        self.hits = DiskHits()
        self._shelf, self._can_trim, self._n_ctx, self._clock = shelf, can_trim, n_ctx, clock
        self._fetch: _Fetch | None = None
        self._hung: Reading | None = None
        self._opened_by = clock() + PATIENCE
        self._refreshed = clock()

    @property
    def is_reading(self) -> bool:
        """Whether somebody waits for the disk."""
        return self._fetch is not None or self._is_opening

    def attend(self, waiting: Iterable[Generation]) -> None:
        """Forget what was read for who does not wait any more."""
        fetch = self._fetch
        if fetch is not None and not any(generation is fetch.owner for generation in waiting):
            self._fetch = None

    def is_awaited(self, generation: Generation, held: Callable[[], int]) -> bool:
        """Whether `generation` should wait for the disk, which leads further than what is `held` already."""
        fetch = self._fetch
        if fetch is not None and fetch.owner is generation:
            return not fetch.reading.is_done and not self._gives_up(generation, fetch)
        if generation.asked_disk:
            return False
        if self._is_late(generation) or self._is_hung:
            generation.asked_disk = True
            return False
        if self._is_opening:
            return True
        best = self._best(generation.tokens.view, generation.kv, held())
        if best is None:
            generation.asked_disk = True
            return False
        if fetch is None:
            generation.asked_disk = True
            self._fetch = _Fetch(generation, self._shelf.read(best))
            return not self._fetch.reading.is_done
        return True

    def _is_late(self, generation: Generation) -> bool:
        if generation.disk_until is None:
            generation.disk_until = self._clock() + PATIENCE
        return self._clock() >= generation.disk_until

    def _gives_up(self, generation: Generation, fetch: _Fetch) -> bool:
        if not self._is_late(generation):
            return False
        self._fetch, self._hung = None, fetch.reading
        return True

    @property
    def _is_hung(self) -> bool:
        """Whether somebody waited in vain for what is still being read: the next would stand behind that."""
        if self._hung is not None and self._hung.is_done:
            self._hung = None
        return self._hung is not None

    def take(self, generation: Generation) -> Entry | None:
        """What was read for `generation`, which is given a slot now."""
        fetch = self._fetch
        if fetch is None or fetch.owner is not generation:
            return None
        self._fetch = None
        return fetch.reading.entry if fetch.reading.is_done else None

    def used(self, n_tokens: int) -> None:
        self.hits = DiskHits(self.hits.hits + 1, self.hits.restored_tokens + n_tokens)

    def wants(self, tokens: TokenIds, kv: KVIdentity) -> bool:
        """Whether `tokens`, which RAM does not keep, are worth a file and in none yet."""
        n = len(tokens)
        return n >= WORTH_SAVING and not any(
            len(shelved.tokens) >= n and self._leads_to(shelved, tokens, n) == n
            for shelved in self._shelf.index
            if shelved.kv == kv
        )

    def keep(self, entry: Entry) -> None:
        """`entry` leaves RAM."""
        if self.wants(entry.tokens, entry.kv):
            self._shelf.write(entry)

    @property
    def _is_opening(self) -> bool:
        return self._shelf.is_opening and self._clock() < self._opened_by

    def _best(self, prompt: TokenIds, kv: KVIdentity, held: int) -> Shelved | None:
        """The file that leads furthest, if that is clearly further than `held`."""
        self._refresh()
        best, longest = None, held + WORTH_SAVING - 1
        for shelved in self._shelf.index:
            n = len(shelved.tokens)
            if shelved.kv != kv or not longest < n <= self._n_ctx or longest >= len(prompt):
                continue
            if shelved.tokens[longest] != prompt[longest]:  # most are told apart by this one token
                continue
            length = self._leads_to(shelved, prompt, len(prompt) - 1)
            if length > longest and (length - held) * WORTH_A_SHARE >= n:
                best, longest = shelved, length
        return best

    def _leads_to(self, shelved: Shelved, tokens: TokenIds, most: int) -> int:
        """How many of the first `most` of `tokens` can be had from the file."""
        return shelved.reachable(min(common_prefix(shelved.tokens, tokens), most), can_trim=self._can_trim)

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._refreshed >= FRESH:
            self._refreshed = now
            self._shelf.refresh()
