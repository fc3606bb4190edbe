"""SavedPrefix: what a model made of the first tokens of a prompt, as bytes that outlive the process.

    head       magic, version, whose it is, how many tokens and bytes follow
    table      of each checkpoint: at how many tokens, and how many bytes
    adapters   their digests and scales, as JSON; nothing without any
    tokens     int32, little-endian
    digest     of all that: who only looks for a beginning reads no further
    state      as the engine sealed it; then those of the checkpoints
    digest     of everything

Nothing is believed before it is checked: each length against the bytes that are there, before anything is made of
it; then the digests; then whose it is. A digest finds damage, not malice: whoever can write such bytes decides
what a model believes to have read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from math import isfinite
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llama_worker._engine.base import SavedState
from llama_worker._errors import StateError
from llama_worker._identity import BASE, KVIdentity
from llama_worker._tokens import TokenIds

VERSION: Final = 1
MAGIC: Final = b"LWKV"
# Magic, version, checkpoints, tokens, bytes of adapters, fingerprint, bytes of the state.
_HEAD: Final = struct.Struct("<4sHHII16sQ")
_ROW: Final = struct.Struct("<IQ")  # tokens, bytes
_DIGEST: Final = 32
FIXED_SIZE: Final = _HEAD.size
"""As many bytes say how long the head is: see `head_size`."""

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixHead:
    """What such bytes hold, without the states. `checkpoints` are (tokens, bytes), in order; `n_bytes` is the whole."""

    fingerprint: bytes
    tokens: TokenIds
    kv: KVIdentity
    state_bytes: int
    checkpoints: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return _head_size(len(self.tokens), len(self.checkpoints), len(_written(self.kv)))

    @property
    def n_bytes(self) -> int:
        return self.size + self.state_bytes + sum(size for _, size in self.checkpoints) + _DIGEST


@dataclass(frozen=True, slots=True, eq=False)
class SavedPrefix:
    """`state` is that of a whole sequence of `tokens`; `checkpoints` are places in it, (tokens, state), in order.

    `fingerprint`, 16 bytes, is of the model and all else that decides what its states mean, but for the adapters that
    they were computed with: those are `kv`.
    """

    fingerprint: bytes
    tokens: TokenIds
    state: SavedState
    checkpoints: tuple[tuple[int, SavedState], ...] = ()
    kv: KVIdentity = BASE

    @property
    def n_bytes(self) -> int:
        """What `to_bytes` takes."""
        states = (self.state, *(state for _, state in self.checkpoints))
        head = _head_size(len(self.tokens), len(self.checkpoints), len(_written(self.kv)))
        return head + sum(map(len, states)) + _DIGEST

    def parts(self) -> list[bytes | memoryview]:
        """`to_bytes`, piece by piece: the states, which are most of it, are not copied. Reads all of it once."""
        states = [self.state, *(state for _, state in self.checkpoints)]
        kv, n, n_tokens = _written(self.kv), len(self.checkpoints), len(self.tokens)
        head = _HEAD.pack(MAGIC, VERSION, n, n_tokens, len(kv), self.fingerprint, len(self.state))
        rows = b"".join(_ROW.pack(length, len(state)) for length, state in self.checkpoints)
        described = head + rows + kv + np.ascontiguousarray(self.tokens, "<i4").tobytes()
        parts: list[bytes | memoryview] = [described + _digest([described]), *(state.data for state in states)]
        return [*parts, _digest(parts)]

    def to_bytes(self) -> bytes:
        return b"".join(self.parts())

    @classmethod
    def parsed(cls, data: Buffer) -> SavedPrefix:
        """What `to_bytes` gave; the arrays are views of `data`, not to be written to. Raises StateError."""
        whole = _readable(data)
        head = parsed_head(whole)
        if head.n_bytes != len(whole):
            raise StateError(f"a saved prefix of {head.n_bytes} bytes is cut off, or none: it has {len(whole)}")
        body, digest = whole[:-_DIGEST], whole[-_DIGEST:].tobytes()
        if _digest([body.data]) != digest:
            raise StateError(f"the saved prefix of {len(head.tokens)} tokens is damaged")
        states, at = [], head.size
        for size in (head.state_bytes, *(size for _, size in head.checkpoints)):
            states.append(whole[at : at + size])
            at += size
        lengths = [length for length, _ in head.checkpoints]
        checkpoints = tuple(zip(lengths, states[1:], strict=True))
        return cls(head.fingerprint, head.tokens, states[0], checkpoints, head.kv)


def head_size(fixed: Buffer) -> int:
    """How many bytes the head takes that begins with `fixed`, FIXED_SIZE bytes. Raises StateError."""
    if len(fixed) < FIXED_SIZE:
        raise StateError(f"a saved prefix of {len(fixed)} bytes is none")
    magic, version, n_checkpoints, n_tokens, kv_bytes, *_ = _HEAD.unpack_from(_readable(fixed).data)
    if magic != MAGIC or version != VERSION:
        raise StateError(f"these bytes are no saved prefix of version {VERSION}")
    return _head_size(n_tokens, n_checkpoints, kv_bytes)


def parsed_head(data: Buffer) -> PrefixHead:
    """The head that `data` begins with. Raises StateError for one that is cut off, damaged or contradicts itself."""
    whole = _readable(data)
    size = head_size(whole.data)
    if len(whole) < size:
        raise StateError(f"a saved prefix of {len(whole)} bytes is cut off")
    described = whole[: size - _DIGEST]
    if _digest([described.data]) != whole[size - _DIGEST : size].tobytes():
        raise StateError("the head of a saved prefix is damaged")
    _, _, n_checkpoints, n_tokens, kv_bytes, fingerprint, state_bytes = _HEAD.unpack_from(described.data)
    rows = [_ROW.unpack_from(described.data, _HEAD.size + i * _ROW.size) for i in range(n_checkpoints)]
    lengths = [0, *(length for length, _ in rows)]
    if not n_tokens or any(a >= b for a, b in pairwise(lengths)) or lengths[-1] > n_tokens:
        raise StateError(f"the checkpoints {lengths[1:]} of a saved prefix of {n_tokens} tokens cannot be")
    tokens = np.frombuffer(described[-4 * n_tokens :].tobytes(), "<i4").astype(np.int32, copy=False)
    at = _HEAD.size + n_checkpoints * _ROW.size
    kv = _read_identity(described[at : at + kv_bytes].tobytes())
    return PrefixHead(fingerprint, tokens, kv, state_bytes, tuple(rows))


def _head_size(n_tokens: int, n_checkpoints: int, kv_bytes: int) -> int:
    return _HEAD.size + n_checkpoints * _ROW.size + kv_bytes + 4 * n_tokens + _DIGEST


def _written(kv: KVIdentity) -> bytes:
    return json.dumps(kv.loras).encode() if kv.loras else b""


def _read_identity(written: bytes) -> KVIdentity:
    """What `_written` gave, and nothing that only resembles it. Raises StateError."""
    try:
        loras = json.loads(written) if written else []
        kv = KVIdentity.of((str(digest), float(scale)) for digest, scale in loras)
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise StateError("the adapters of a saved prefix cannot be read") from exc
    if _written(kv) != written or not all(isfinite(scale) for _, scale in kv.loras):
        raise StateError("the adapters of a saved prefix cannot be")
    return kv


def _readable(data: Buffer) -> NDArray[np.uint8]:
    whole: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    whole.setflags(write=False)
    return whole


def _digest(parts: Sequence[bytes | memoryview]) -> bytes:
    digest = blake2b(digest_size=_DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()
