"""The line of what waits to be written: one for this process, as there is one thread that writes.

Each model that is loaded brings its own Disk, and what the former one was to write is still in memory then. So what
is bounded, waited for and looked up is the line, not what one Disk put there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Final

from llama_worker._entry import Entry
from llama_worker._shelved import Shelved


class Writing:
    """An entry in the line, which will be the file at `path`, None where that is not known yet.

    `owner`: whoever waits for it in the end; compared, never called.
    """

    def __init__(self, entry: Entry, path: Path | None, owner: object) -> None:
        places = tuple(checkpoint.length for checkpoint in entry.checkpoints)
        self.entry, self.path, self.owner = entry, path, owner
        self.done: Future[None] = Future()
        self.shelved = Shelved(tokens=entry.tokens, kv=entry.kv, checkpoints=places, n_bytes=entry.n_bytes)


class Line:
    """Any thread; only `flush` blocks."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A forked child has the line of its parent, and nobody who writes it."""
        self._lock, self._writing = threading.Lock(), list[Writing]()

    def room(self, most: int) -> int:
        """Bytes that may come into the line now, when it may have `most`."""
        with self._lock:
            return most - self._n_bytes()

    def join(self, writing: Writing, most: int) -> Writing | None:
        """Put `writing` into the line, which may have `most` bytes; one alone may be larger. None without room.

        What is to be the same file as one in the line is in it already: returns that one.
        """
        with self._lock:
            if writing.entry.n_bytes > most - self._n_bytes() and self._writing:
                return next(self._same(writing), None)
            found = next(self._same(writing), writing)
            if found is writing:
                self._writing.append(writing)
        if found is writing:
            writing.done.add_done_callback(self._leave)  # its bytes are not kept for longer than they wait
        return found

    def of(self, folder: Path, fingerprint: bytes) -> list[Writing]:
        """What will be files of this model there."""
        beginning = os.path.join(folder, fingerprint.hex())
        with self._lock:
            return [writing for writing in self._under_way() if str(writing.path).startswith(beginning)]

    def flush(self, owner: object, timeout: float) -> None:
        """Wait until everything of `owner` is written, at most `timeout` seconds."""
        with self._lock:
            done = [writing.done for writing in self._writing if writing.owner == owner]
        wait(done, timeout)

    def _leave(self, _done: Future[None]) -> None:
        with self._lock:
            self._under_way()

    def _under_way(self) -> list[Writing]:
        self._writing = [writing for writing in self._writing if not writing.done.done()]
        return self._writing

    def _n_bytes(self) -> int:
        return sum(writing.entry.n_bytes for writing in self._under_way())

    def _same(self, writing: Writing) -> Iterator[Writing]:
        return (other for other in self._writing if writing.path is not None and other.path == writing.path)


line: Final = Line()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=line.forget)
