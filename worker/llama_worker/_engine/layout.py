"""Layout: which keys and tensors a GGUF file has, of which types and shapes.

libggml's functions read values, but say no shape without a ggml context, and abort where a key has not the type
that is asked for. So what an adapter is checked against is read here. Only for files that `read_header` took.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llama_worker._errors import ModelLoadError

_STRING: Final = 8
ARRAY: Final = 9
_WIDTHS: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape` has four numbers, as llama.cpp counts: the first is the length of a row. `kind` is a ggml_type."""

    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True, slots=True)
class Layout:
    """`kinds`: the GGUF type of each key, ARRAY for lists. Names are bytes: they may be anything."""

    kinds: Mapping[bytes, int]
    tensors: Mapping[bytes, Tensor]


def read_layout(paths: Sequence[Path]) -> Layout:
    """The layout of a model's files together; read again only when they have changed. Raises ModelLoadError."""
    return _read_layout(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths))


@functools.lru_cache(maxsize=16)
def _read_layout(files: tuple[tuple[Path, int, int], ...]) -> Layout:
    kinds: dict[bytes, int] = {}
    tensors: dict[bytes, Tensor] = {}
    for path, _, _ in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _walk(data, kinds, tensors)
            except (struct.error, KeyError, OverflowError):
                raise ModelLoadError(f"{path.name} changed while it was read; try again") from None
    return Layout(kinds, tensors)


def _walk(data: mmap.mmap, kinds: dict[bytes, int], tensors: dict[bytes, Tensor]) -> None:
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    at = 24
    for _ in range(n_keys):
        name, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        kinds[name] = kind
        at = _behind_value(data, at + 4, kind)
    for _ in range(n_tensors):
        name, at = _text(data, at)
        (n_dims,) = struct.unpack_from("<I", data, at)
        dims = struct.unpack_from(f"<{min(n_dims, 4)}Q", data, at + 4)
        (kind,) = struct.unpack_from("<I", data, at + 4 + 8 * n_dims)
        tensors[name] = Tensor((*dims, 1, 1, 1, 1)[:4], kind)
        at += 4 + 8 * n_dims + 4 + 8


def _text(data: mmap.mmap, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length], at + 8 + length


def _behind_value(data: mmap.mmap, at: int, kind: int) -> int:
    count = 1
    if kind == ARRAY:
        kind, count = struct.unpack_from("<IQ", data, at)
        at += 12
    if kind != _STRING:
        return at + count * _WIDTHS[kind]
    length_at = struct.Struct("<Q").unpack_from
    for _ in range(count):
        at += 8 + length_at(data, at)[0]
    return at
