"""Whose states these are: everything that decides what saved states mean, as 16 bytes.

States that stay in their context need only its own mark. Those that leave it, to a folder or another process, meet
models that differ in the middle of their weights, other versions of llama.cpp and other templates.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Final

from llama_worker._engine.base import ModelInfo
from llama_worker._models import model_files
from llama_worker._view import ModelView

_PIECE: Final = 2**22
_CHECK: Final = 16
_OURS: Final = re.compile(r"[0-9a-f]{32}\.model(\.[0-9]+-[0-9a-f]{16}\.tmp)?")
_STALE: Final = 600.0
"""Seconds after which nobody writes to an unfinished note any more."""
MOST_NOTES: Final = 64
"""In a folder. A model that changes has a new one."""


def fingerprint_of(view: ModelView, content: bytes | None = None) -> bytes:
    """16 bytes that differ between any two models or settings of which one cannot use the other's states.

    Blocks, unless `content` is given: it reads the whole model, a second or two for each GiB, once for each file and
    process. Raises OSError, ModelLoadError.
    """
    digest = blake2b(digest_size=16)
    for part in (view.limits.state_mark, content or content_of(view.info), view.template.digest.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def content_of(info: ModelInfo) -> bytes:
    """A digest of every byte of the model's files. `info.digest`, which is made of samples, where there is no file.

    Blocks and raises as `fingerprint_of`.
    """
    if "://" in info.path:
        return info.digest.encode()
    return b"".join(_digest_of(path, *_stamp(path)) for path in model_files(Path(info.path)))


def noted_content(info: ModelInfo, folder: Path) -> bytes | None:
    """What `content_of` says, where that was noted in `folder` for the same files as they are now. Milliseconds."""
    if "://" in info.path:
        return info.digest.encode()
    try:
        noted = (folder / _note_name(info)).read_bytes()
    except OSError:
        return None
    content, check = noted[:-_CHECK], noted[-_CHECK:]
    return content if content and _check(content) == check else None


def note_content(info: ModelInfo, folder: Path, content: bytes) -> None:
    """Spare the next process the reading. Raises OSError."""
    if "://" in info.path:
        return
    path = folder / _note_name(info)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content + _check(content))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sweep(folder, path.name)


def _sweep(folder: Path, just_written: str) -> None:
    """Remove what killed writers left, and the oldest notes where there are many. Raises OSError."""
    notes = []
    with os.scandir(folder) as found:
        for file in found:
            if _OURS.fullmatch(file.name) and file.is_file(follow_symlinks=False) and file.name != just_written:
                notes.append((file.stat(follow_symlinks=False).st_mtime, Path(file.path)))
    notes.sort(reverse=True)
    finished = [path for _, path in notes if path.suffix == ".model"]
    unfinished = [path for used, path in notes if path.suffix != ".model" and time.time() - used > _STALE]
    for path in [*finished[MOST_NOTES - 1 :], *unfinished]:
        path.unlink(missing_ok=True)


def _note_name(info: ModelInfo) -> str:
    """Another one as soon as a file was moved, replaced or written to. Raises OSError."""
    stamps = [(str(path), _stamp(path)) for path in model_files(Path(info.path))]
    return f"{blake2b(repr(stamps).encode('utf-8', 'surrogateescape'), digest_size=16).hexdigest()}.model"


def _check(content: bytes) -> bytes:
    return blake2b(content, digest_size=_CHECK).digest()


def _stamp(path: Path) -> tuple[int, ...]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, *_stamp: int) -> bytes:
    digest, piece = blake2b(digest_size=16), bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(piece):
            digest.update(memoryview(piece)[:n])
    return digest.digest()
