"""The header of a GGUF file: read by libggml's own functions, in milliseconds, without touching a tensor.

The file may come from anywhere, and C code believes what it reads. So Python walks the header first and
refuses whatever a length or a count cannot be true of; the values themselves are libggml's.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from llama_worker._engine.library import library
from llama_worker._errors import ModelLoadError

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | tuple[int | float | bool, ...]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
# GGUF type -> how Python reads one value of it; strings and arrays have none.
_C_TYPES: Final[Mapping[int, Any]] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}
# The smallest that a key and a tensor can take: lengths, types and one byte of name.
_MIN_KEY: Final = 8 + 1 + 4 + 1
_MIN_TENSOR: Final = 8 + 1 + 4 + 4 + 8
_MAX_KEY: Final = 65_535
_F32: Final = 0
# They are added to or multiplied with F32, and the CPU aborts where the second of two is of another type.
_ALWAYS_F32: Final = (b"norm.weight", b".bias")
_TOKENS: Final = b"tokenizer.ggml.tokens"
# Per-layer lists are shorter than this; token scores and types are longer and of no use here.
_MAX_LIST: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """`values`: scalars, texts and short lists of numbers by key; `lengths`: the length of every array.

    `n_params` counts the elements and `n_bytes` the bytes of all tensors, `tensors` the bytes of each by its
    name; they lie from `start` to `end` in the file.
    """

    values: Mapping[str, Value]
    lengths: Mapping[str, int]
    n_params: int
    n_bytes: int
    tensors: Mapping[str, int]
    start: int
    end: int

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str, default: int = 0) -> int:
        """A number, or the largest of a list of numbers."""
        return max(self.integers(key), default=default)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of numbers; a single number is a list of one."""
        value = self.values.get(key)
        items = value if isinstance(value, tuple) else (value,)
        return tuple(int(item) for item in items if isinstance(item, int))


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file at `path`. Any thread.

    Raises ModelLoadError for what is no GGUF file, is damaged, has tensors that llama.cpp aborts at, or is
    shorter than they need;
    OSError when the file cannot be read; EngineVersionError.
    """
    check_layout(path)
    ggml = _ggml()
    context = ggml.gguf_init_from_file(bytes(path), _InitParams(no_alloc=True, ctx=None))
    if not context:
        raise _damaged(path, "libggml refuses its header")
    try:
        header = _read(ggml, context)
    except _Broken as broken:
        raise _damaged(path, str(broken)) from None
    finally:
        ggml.gguf_free(context)
    if header.end > path.stat().st_size:
        missing = header.end - path.stat().st_size
        raise _damaged(path, f"{missing} bytes are missing at its end; the download was probably cut off")
    return header


def _damaged(path: Path, reason: str) -> ModelLoadError:
    return ModelLoadError(f"{path.name} is damaged: {reason}. Fetch the file again")


# --- the walk: nothing is believed that the size of the file contradicts


def check_layout(path: Path) -> None:
    """Follow every length in the header and see that it stays within the file. Raises ModelLoadError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            raise ModelLoadError(f"{path.name} is empty; fetch the file again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != _MAGIC:
                raise ModelLoadError(f"{path.name} is no GGUF file (it does not begin with 'GGUF'); convert it first")
            try:
                _walk(data, size)
            except _Broken as broken:
                raise _damaged(path, str(broken)) from None
            except (struct.error, OverflowError):
                raise _damaged(path, "a length in its header reaches beyond its end") from None


class _Broken(Exception):
    """The header contradicts itself or the size of the file."""


def _walk(data: mmap.mmap, size: int) -> None:
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, 4)
    if version not in _VERSIONS:
        raise _Broken(f"GGUF version {version} is none of {_VERSIONS}")
    at = 24
    if n_keys * _MIN_KEY + n_tensors * _MIN_TENSOR > size - at:
        raise _Broken(f"{n_keys} keys and {n_tensors} tensors cannot be in {size} bytes")
    for _ in range(n_keys):
        at = _skip_key(data, at, size)
    if n_tensors * _MIN_TENSOR > size - at:
        raise _Broken(f"{n_tensors} tensors cannot be in the last {size - at} bytes")


def _skip_key(data: mmap.mmap, at: int, size: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    if not 0 < length <= _MAX_KEY:
        raise _Broken(f"a key of {length} bytes at offset {at}")
    key = data[at + 8 : at + 8 + length]
    (kind,) = struct.unpack_from("<I", data, at + 8 + length)
    at += 8 + length + 4
    count = 1
    if kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", data, at)
        at += 12
    end = _skip_strings(data, at, count, size) if kind == _STRING else at + count * _width(kind)
    if end > size:
        raise _Broken(f"a value reaches {end - size} bytes beyond the end of the file")
    if key == _TOKENS and kind == _STRING:
        _require_distinct(data, at, count)
    return end


def _width(kind: int) -> int:
    if kind not in _C_TYPES:
        raise _Broken(f"a value of the unknown type {kind}")
    return ctypes.sizeof(_C_TYPES[kind])


def _skip_strings(data: mmap.mmap, at: int, count: int, size: int) -> int:
    if count * 8 > size - at:
        raise _Broken(f"an array of {count} strings cannot be in the last {size - at} bytes")
    length_at = struct.Struct("<Q").unpack_from  # bound once: vocabularies have 100,000s of strings
    for _ in range(count):
        at += 8 + length_at(data, at)[0]
    return at


def _require_distinct(data: mmap.mmap, at: int, count: int) -> None:
    """llama.cpp asserts that no two tokens are the same. It reads them as C strings and numbers the empty ones."""
    tokens, length_at = set(), struct.Struct("<Q").unpack_from
    for index in range(count):
        start, at = at + 8, at + 8 + length_at(data, at)[0]
        tokens.add(data[start:at].partition(b"\0")[0] or b"[EMPTY_%d]" % index)
    if len(tokens) < count:
        raise _Broken(f"{count - len(tokens)} of its {count} tokens are there twice")


# --- libggml


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


_SIGNATURES: Final[Mapping[str, tuple[Any, tuple[Any, ...]]]] = {
    "gguf_init_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _InitParams)),
    "gguf_free": (None, (ctypes.c_void_p,)),
    "gguf_get_data_offset": (ctypes.c_size_t, (ctypes.c_void_p,)),
    "gguf_get_n_kv": (ctypes.c_int64, (ctypes.c_void_p,)),
    "gguf_get_key": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_kv_type": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_arr_type": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_arr_n": (ctypes.c_size_t, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_arr_data": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_val_data": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_val_str": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_n_tensors": (ctypes.c_int64, (ctypes.c_void_p,)),
    "gguf_get_tensor_offset": (ctypes.c_size_t, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_tensor_name": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_tensor_type": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64)),
    "gguf_get_tensor_size": (ctypes.c_size_t, (ctypes.c_void_p, ctypes.c_int64)),
    "ggml_blck_size": (ctypes.c_int64, (ctypes.c_int,)),
    "ggml_type_size": (ctypes.c_size_t, (ctypes.c_int,)),
}


class _Functions:
    """The bound functions, as attributes of their own names."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@functools.cache
def _ggml() -> _Functions:
    """libggml's functions, found through libllama's handle: opening libggml by path loads a second copy."""
    handle, functions = library().api._lib, _Functions()
    for name, (result, arguments) in _SIGNATURES.items():
        call = handle[name]  # a new object each time, so nobody else's signatures change
        call.restype, call.argtypes = result, arguments
        setattr(functions, name, call)
    return functions


def _read(ggml: Any, context: int) -> Header:
    values: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for index in range(ggml.gguf_get_n_kv(context)):
        key = ggml.gguf_get_key(context, index).decode("utf-8", "replace")
        if ggml.gguf_get_kv_type(context, index) == _ARRAY:
            lengths[key] = ggml.gguf_get_arr_n(context, index)
        value = _value(ggml, context, index)
        if value is not None:
            values[key] = value
    return Header(values=values, lengths=lengths, **_tensors(ggml, context))


def _value(ggml: Any, context: int, index: int) -> Value | None:
    kind = ggml.gguf_get_kv_type(context, index)
    if kind == _STRING:
        return str(ggml.gguf_get_val_str(context, index).decode("utf-8", "replace"))
    if kind != _ARRAY:
        scalar: Scalar = _C_TYPES[kind].from_address(ggml.gguf_get_val_data(context, index)).value
        return scalar
    count, kind = ggml.gguf_get_arr_n(context, index), ggml.gguf_get_arr_type(context, index)
    if kind == _STRING or count > _MAX_LIST:
        return None
    return tuple((_C_TYPES[kind] * count).from_address(ggml.gguf_get_arr_data(context, index))) if count else ()


def _tensors(ggml: Any, context: int) -> dict[str, Any]:
    start = ggml.gguf_get_data_offset(context)
    n_params = n_bytes = end = 0
    tensors: dict[str, int] = {}
    for index in range(ggml.gguf_get_n_tensors(context)):
        kind, size = ggml.gguf_get_tensor_type(context, index), ggml.gguf_get_tensor_size(context, index)
        if kind != _F32 and (name := ggml.gguf_get_tensor_name(context, index)).endswith(_ALWAYS_F32):
            raise _Broken(f"its tensor {name.decode('utf-8', 'replace')} is not of type F32")
        n_params += size // ggml.ggml_type_size(kind) * ggml.ggml_blck_size(kind)
        n_bytes += size
        tensors[ggml.gguf_get_tensor_name(context, index).decode("utf-8", "replace")] = size
        end = max(end, start + ggml.gguf_get_tensor_offset(context, index) + size)
    return {
        "n_params": n_params,
        "n_bytes": n_bytes,
        "tensors": tensors,
        "start": start,
        "end": end,
    }
