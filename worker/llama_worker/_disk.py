"""Disk: the folder of one loaded model, behind threads. See `_disk_store` for the files, `_disk_tier` for their use.

Nothing here may cost a request: what fails is counted, said once in the log, and the request computes its tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from llama_worker._cache_identity import content_of, fingerprint_of, note_content, noted_content
from llama_worker._disk_line import Writing, line
from llama_worker._disk_store import DiskStore
from llama_worker._disk_threads import begin, begin_alone, begin_reading
from llama_worker._entry import Entry, entry_of, saved_prefix
from llama_worker._shelved import Shelved
from llama_worker._superseding import supersede
from llama_worker._view import ModelView

logger = logging.getLogger("llama_worker")

LEAST_LINE = 256 << 20
"""Bytes that may wait to be written in this process, at least: as many as `cache_ram`, if that is more."""


@dataclass(slots=True, eq=False)
class Reading:
    """One file on its way into memory. Written by the reading thread: `is_done` last."""

    entry: Entry | None = None
    is_done: bool = False


class Disk:
    """A Shelf (see `_disk_tier`). Made and asked by the worker thread; `nudge` wakes it when something was read.

    `written` files; `dropped` were not, for the line was full or they alone exceed the budget; `failures` is how often
    a file could not be read or written, or was damaged.
    """

    def __init__(self, view: ModelView, folder: str, budget: int, nudge: Callable[[], object]) -> None:
        self.is_opening = True
        self.written = 0
        self._view, self._folder, self._budget, self._nudge = view, Path(folder), budget, nudge
        self._line = max(LEAST_LINE, view.config.cache_ram << 20)
        self._store: DiskStore | None = None
        self._writing: list[Writing] = []
        self._inherited: SimpleQueue[Writing] = SimpleQueue()
        self._looking: Future[None] | None = None
        self._n_refused = self._n_too_large = 0  # one counter for each thread that counts
        self._n_unread = self._n_failed = 0
        self._has_warned = False
        self._opened: Future[None] = Future()
        begin_alone(self._open)

    def __repr__(self) -> str:
        return f"<Disk {'opening' if self._store is None else self._store!r}>"

    @property
    def index(self) -> Sequence[Shelved]:
        """What there is, and what is about to be: it can be had already, from the line of what is to be written."""
        files = () if self._store is None else self._store.index
        return (*files, *[writing.shelved for writing in self._under_way()])

    @property
    def n_files(self) -> int:
        return 0 if self._store is None else len(self._store.index)

    @property
    def n_bytes(self) -> int:
        return 0 if self._store is None else self._store.n_bytes

    @property
    def dropped(self) -> int:
        return self._n_refused + self._n_too_large

    @property
    def failures(self) -> int:
        return self._n_unread + self._n_failed

    @property
    def room(self) -> int:
        """Bytes that may be given to `write` now."""
        return line.room(self._line)

    def read(self, shelved: Shelved) -> Reading:
        """See Shelf."""
        for writing in self._writing:
            if writing.shelved is shelved:
                return Reading(writing.entry, is_done=True)
        reading = Reading()
        begin_reading(lambda: self._read(shelved, reading))
        return reading

    def write(self, entry: Entry) -> None:
        """See Shelf."""
        store = self._store
        path = None if store is None else self._folder / store.name_of(saved_prefix(entry, store.fingerprint))
        writing = Writing(entry, path, self._nudge)
        found = line.join(writing, self._line)
        if found is None:
            self._n_refused += 1
            return
        if found is writing:
            begin(lambda: self._write(entry), writing.done)
        self._writing.append(found if found is writing else self._following(found))

    def refresh(self) -> None:
        """See Shelf."""
        if self._looking is None or self._looking.done():
            self._looking = begin(self._look)

    def _under_way(self) -> list[Writing]:
        while not self._inherited.empty():
            self._writing.append(self._inherited.get())
        self._writing = [writing for writing in self._writing if not writing.done.done()]
        return self._writing

    def _following(self, other: Writing) -> Writing:
        """What somebody else has in the line is under way until the index has it."""
        mine = Writing(other.entry, other.path, self._nudge)
        other.done.add_done_callback(lambda _: begin(self._look, mine.done))
        return mine

    # -- on a thread of its own ---------------------------------------------------------------------

    def _open(self) -> None:
        try:
            store = DiskStore(self._folder, fingerprint_of(self._view, self._content()), self._budget)
            for writing in line.of(self._folder, store.fingerprint):
                self._inherited.put(self._following(writing))  # what the former model left, mostly
            self._store = store
            self._n_failed += store.look()
        except Exception as exc:  # noqa: BLE001  whatever it is: then there is no disk
            self._n_failed += 1
            self._warn(exc)
        finally:
            self.is_opening = False
            self._opened.set_result(None)  # from now on its thread is the one for writes
            self._nudge()

    def _content(self) -> bytes:
        info = self._view.info
        known = noted_content(info, self._folder)
        if known is not None:
            return known
        self.is_opening = False  # reading all of a model takes long: no request waits for that
        content = content_of(info)
        try:
            note_content(info, self._folder, content)
        except OSError as exc:
            self._n_failed += 1
            self._warn(exc)
        return content

    # -- on the thread for writes -------------------------------------------------------------------

    def _write(self, entry: Entry) -> None:
        self._opened.result()
        store = self._store
        if store is None:
            return  # it could not be opened, which was said
        try:
            if store.write(saved_prefix(entry, store.fingerprint)):
                self.written += 1
                supersede(store, entry, can_trim=self._view.limits.can_trim_restored)
            else:
                self._n_too_large += 1
            self._n_failed += store.look()
        except Exception as exc:  # noqa: BLE001
            self._n_failed += 1
            self._warn(exc)

    def _look(self) -> None:
        self._opened.result()
        try:
            if self._store is not None:
                self._n_failed += self._store.look()
        except Exception as exc:  # noqa: BLE001
            self._n_failed += 1
            self._warn(exc)

    # -- on the thread for reads --------------------------------------------------------------------

    def _read(self, shelved: Shelved, reading: Reading) -> None:
        try:
            saved = None if self._store is None else self._store.read(shelved)
            reading.entry = None if saved is None else entry_of(saved)
        except Exception as exc:  # noqa: BLE001
            self._n_unread += 1
            self._warn(exc)
        finally:
            reading.is_done = True
            self._nudge()

    def _warn(self, exc: Exception) -> None:
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "cache_dir %s does not serve as it should: %s: %s", self._folder, type(exc).__name__, exc)
