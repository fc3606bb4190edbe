"""DiskStore: saved prefixes in a folder, one file each, that several processes may use at once.

The folder is the truth: what is in it is found by its name and described by its own head, so there is no list that
could be torn. A file is written beside its place, flushed, and renamed into it: a reader sees all of it or nothing,
and never waits for a writer. Two who write the same write the same file. Who finds a file gone has missed it, no
more. Whoever writes sees to it that all files together keep to his budget; those used longest ago go first, whose
ever they are. A writer that was killed leaves a file that nobody looks at, and that goes when it is old.

What has another name than these files have is somebody else's: it is neither counted nor removed.

A file holds what was said to a model. It can be read by its owner only, and so can a folder that is made here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from llama_worker._errors import StateError
from llama_worker._saved_prefix import FIXED_SIZE, MAGIC, VERSION, PrefixHead, SavedPrefix, head_size, parsed_head
from llama_worker._shelved import Shelved

_KEPT: Final = f".kv{VERSION}"
_UNFINISHED: Final = ".tmp"
_OURS: Final = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}\.kv[0-9]+(\.[0-9]+-[0-9]+\.tmp)?")
"""The name of a file of any model and version, finished or not."""
_STALE: Final = 600.0
"""Seconds after which nobody writes to an unfinished file any more."""
MOST: Final = 1024
"""Files in the folder: all are listed for each write, and looked at for each prompt."""

_Stamp: TypeAlias = tuple[int, int, int]
"""When a file was used, in ns; its bytes and its inode: another file in its place has another one."""

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
        self._known: dict[str, tuple[_Stamp, Shelved | None]] = {}

    def __repr__(self) -> str:
        return f"<DiskStore of {len(self.index)} prefixes: {self.n_bytes} bytes>"

    @property
    def n_bytes(self) -> int:
        """Of the files in the index."""
        return sum(shelved.n_bytes for shelved in self.index)

    def look(self) -> int:
        """Bring `index` up to date with the folder. Returns how many files were damaged, and are removed."""
        known, damaged = {}, 0
        for file in _files(self._folder):
            stamp = _stamp_at(file.path) if self._is_ours(file.name) else None
            if stamp is None:
                continue  # another model's, or gone meanwhile
            before = self._known.get(file.name)
            if before is not None and before[0] == stamp:
                known[file.name] = before
            else:
                shelved, is_damaged = self._describe(file)
                known[file.name] = stamp, shelved
                damaged += is_damaged
        self._known = known
        self.index = tuple(shelved for _, shelved in known.values() if shelved is not None)
        return damaged

    def read(self, shelved: Shelved) -> SavedPrefix | None:
        """What is in the file, which was used just now; None when it is gone. Raises StateError for a damaged one,
        which is removed.
        """
        path = self._folder / shelved.name
        try:
            with path.open("rb", buffering=0) as file:
                saved = self._parsed(path, file)
        except FileNotFoundError:
            return None
        self._touch(path)
        return saved

    def _parsed(self, path: Path, file: FileIO) -> SavedPrefix:
        """All of `file`, whatever is at `path` by now: others may have replaced what the index knows."""
        try:
            head = self._head(file)
            file.seek(0)
            return SavedPrefix.parsed(_whole(file, head.n_bytes))
        except StateError:
            _discard(path, file)
            raise

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
        """What the head of `file` says, and whether it is damaged. What cannot be read is not looked at
        again until it changes.
        """
        path = Path(file.path)
        try:
            with path.open("rb", buffering=0) as opened:
                used = os.fstat(opened.fileno()).st_mtime_ns
                try:
                    head = self._head(opened)
                except StateError:
                    _discard(path, opened)
                    return None, True
        except OSError:
            return None, False
        lengths = tuple(length for length, _ in head.checkpoints)
        shelved = Shelved(
            name=file.name,
            kv=head.kv,
            tokens=head.tokens,
            checkpoints=lengths,
            n_bytes=head.n_bytes,
            used=used,
        )
        return shelved, False

    def _head(self, file: FileIO) -> PrefixHead:
        """Raises StateError unless `file` is a prefix of this store, from its first byte to the last that it names."""
        size = os.fstat(file.fileno()).st_size
        head = parsed_head(_first(file, size))
        self._require_ours(head.fingerprint)
        if head.n_bytes != size:
            raise StateError(f"a saved prefix of {head.n_bytes} bytes is cut off")
        return head

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
            if _is_saved_prefix(path):
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
            return [f for f in found if _OURS.fullmatch(f.name) and f.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _stamp_at(path: str | Path) -> _Stamp | None:
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(stat: os.stat_result) -> _Stamp:
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _is_saved_prefix(path: Path) -> bool:
    """By its first bytes; what is empty, as a power cut leaves it, holds nothing of anybody's."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(len(MAGIC)) in (MAGIC, b"")
    except OSError:
        return False


def _first(file: FileIO, size: int) -> bytes:
    """The head of a file of `size` bytes. Raises StateError when that is more than there is."""
    fixed = file.read(FIXED_SIZE) or b""
    wanted = head_size(fixed)
    if wanted > size:
        raise StateError(f"a saved prefix of {size} bytes is cut off")
    return fixed + (file.read(wanted - FIXED_SIZE) or b"")


def _whole(file: FileIO, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The next `size` bytes of a file, or as many as there are."""
    data = np.empty(size, np.uint8)
    at = 0
    while at < size and (n := file.readinto(data[at:].data)):
        at += n
    return data[:at]


def _discard(path: Path, file: FileIO) -> None:
    """Remove the damaged `file`, not a whole one that is at `path` meanwhile."""
    if _stamp_at(path) == _stamp(os.fstat(file.fileno())):
        _remove(path)


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
