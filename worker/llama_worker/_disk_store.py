"""DiskStore: saved prefixes in a folder, one file each, that several processes may use at once.

The folder is the truth: what is in it is found by its name and described by its own head, so there is no list that
could be torn. A file is written beside its place, flushed, and renamed into it: a reader sees all of it or nothing,
and never waits for a writer. Two who write the same write the same file. Who finds a file gone has missed it, no
more. Whoever writes sees to it that all files together keep to his budget; those used longest ago go first, whose
ever they are. A writer that was killed leaves a file that nobody looks at, and that goes when it is old.

A file holds what was said to a model. It can be read by its owner only, and so can a folder that is made here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np

from llama_worker._errors import StateError
from llama_worker._saved_prefix import FIXED_SIZE, VERSION, SavedPrefix, head_size, parsed_head
from llama_worker._shelved import Shelved

_KEPT: Final = f".kv{VERSION}"
_ANY_VERSION: Final = ".kv"
_UNFINISHED: Final = ".tmp"
_STALE: Final = 600.0
"""Seconds after which nobody writes to an unfinished file any more."""
MOST: Final = 1024
"""Files in the folder: all are listed for each write, and looked at for each prompt."""

_numbers = itertools.count()


class DiskStore:
    """The files of one `fingerprint` in `folder`, which is made when something is written.

    Every method blocks for as long as the disk does, and raises OSError for what it refuses. `look` and `write` are
    for one thread at a time; `read` for any, beside them; `index` may be looked at by any.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: bytes,
        budget: int | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.fingerprint = fingerprint
        self.index: tuple[Shelved, ...] = ()
        self._folder, self._budget, self._clock = folder, budget, clock
        self._known: dict[str, Shelved | None] = {}

    def __repr__(self) -> str:
        return f"<DiskStore of {len(self.index)} prefixes: {self.n_bytes} bytes>"

    @property
    def n_bytes(self) -> int:
        """Of the files in the index."""
        return sum(shelved.n_bytes for shelved in self.index)

    def look(self) -> int:
        """Bring `index` up to date with the folder. Returns how many files were damaged, and are removed."""
        found = [file for file in _files(self._folder) if self._is_ours(file.name)]
        heads = {file.name: self._known.get(file.name, file) for file in found}
        damaged = 0
        for name, head in heads.items():
            if isinstance(head, os.DirEntry):
                heads[name], is_damaged = self._describe(head)
                damaged += is_damaged
        self._known = {name: head for name, head in heads.items() if not isinstance(head, os.DirEntry)}
        self.index = tuple(head for head in self._known.values() if head is not None)
        return damaged

    def read(self, shelved: Shelved) -> SavedPrefix | None:
        """What is in the file, which was used just now; None when it is gone. Raises StateError for a damaged one,
        which is removed.
        """
        path = self._folder / shelved.name
        try:
            data = _whole(path, shelved.n_bytes)
        except FileNotFoundError:
            return None
        try:
            saved = SavedPrefix.parsed(data)
            self._require_ours(saved.fingerprint)
        except StateError:
            _remove(path)
            raise
        self._touch(path)
        return saved

    def write(self, saved: SavedPrefix) -> bool:
        """Keep `saved`, whose fingerprint is this store's. False when it is larger than everything may be."""
        size = saved.n_bytes
        if self._budget is not None and size > self._budget:
            return False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / self.name_of(saved)
        if path.exists():
            self._touch(path)
            return True
        self._make_room(size)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}{_UNFINISHED}")
        try:
            self._fill(temporary, saved)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _flush_folder(self._folder)
        return True

    def remove(self, shelved: Shelved) -> None:
        """Nobody needs it any more."""
        _remove(self._folder / shelved.name)

    def name_of(self, saved: SavedPrefix) -> str:
        """The same for the same tokens of the same model with the same adapters."""
        content = blake2b(saved.kv.mark + np.ascontiguousarray(saved.tokens, "<i4").tobytes(), digest_size=16)
        return f"{self.fingerprint.hex()}-{content.hexdigest()}{_KEPT}"

    def _is_ours(self, name: str) -> bool:
        return name.startswith(self.fingerprint.hex()) and name.endswith(_KEPT)

    def _require_ours(self, fingerprint: bytes) -> None:
        if fingerprint != self.fingerprint:
            raise StateError("a saved prefix is another model's, or of other settings")

    def _describe(self, file: os.DirEntry[str]) -> tuple[Shelved | None, bool]:
        """What the head of `file` says, and whether it is damaged. What cannot be read is looked at once."""
        path = Path(file.path)
        try:
            stat = os.stat(path)
            head = parsed_head(_first(path, stat.st_size))
            self._require_ours(head.fingerprint)
            if head.n_bytes != stat.st_size:
                raise StateError(f"a saved prefix of {head.n_bytes} bytes is cut off")
        except OSError:
            return None, False
        except StateError:
            _remove(path)
            return None, True
        lengths = tuple(length for length, _ in head.checkpoints)
        shelved = Shelved(
            name=file.name,
            kv=head.kv,
            tokens=head.tokens,
            checkpoints=lengths,
            n_bytes=head.n_bytes,
            used=stat.st_mtime_ns,
        )
        return shelved, False

    def _fill(self, path: Path, saved: SavedPrefix) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
            for part in saved.parts():
                view = memoryview(part)
                while len(view):
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        self._touch(path)

    def _touch(self, path: Path) -> None:
        """It was used now. A folder that cannot be written to has no order then."""
        now = int(self._clock() * 1e9)
        with contextlib.suppress(OSError):
            os.utime(path, ns=(now, now))

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago until `size` more bytes keep to the budget."""
        if self._budget is None:
            return
        files = sorted(self._all_files())
        total, count = sum(n for _, n, _ in files), len(files)
        for _, n_bytes, path in files:
            if total + size <= self._budget and count < MOST:
                return
            _remove(path)
            total, count = total - n_bytes, count - 1

    def _all_files(self) -> Iterator[tuple[int, int, Path]]:
        """When they were used, their bytes, and where they are; without those that a killed writer left."""
        for file in _files(self._folder):
            try:
                stat = os.stat(file.path)
            except OSError:
                continue  # gone meanwhile
            if file.name.endswith(_UNFINISHED):
                if self._clock() - stat.st_mtime > _STALE:
                    _remove(Path(file.path))
            else:
                yield stat.st_mtime_ns, stat.st_size, Path(file.path)


def _files(folder: Path) -> list[os.DirEntry[str]]:
    """What is, or will be, a saved prefix of any version; nothing where there is no folder."""
    try:
        with os.scandir(folder) as found:
            return [f for f in found if _ANY_VERSION in f.name and f.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _first(path: Path, size: int) -> bytes:
    """The head of a file of `size` bytes. Raises StateError when that is more than there is."""
    with path.open("rb", buffering=0) as file:
        fixed = file.read(FIXED_SIZE) or b""
        wanted = head_size(fixed)
        if wanted > size:
            raise StateError(f"a saved prefix of {size} bytes is cut off")
        return fixed + (file.read(wanted - FIXED_SIZE) or b"")


def _whole(path: Path, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The first `size` bytes of a file, or as many as there are."""
    data = np.empty(size, np.uint8)
    with path.open("rb", buffering=0) as file:
        at = 0
        while at < size and (n := file.readinto(data[at:].data)):
            at += n
    return data[:at]


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _flush_folder(folder: Path) -> None:
    """Let the renaming outlive a power cut, where folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
