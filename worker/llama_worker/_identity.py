"""KVIdentity: what the KV of a sequence depends on beside its tokens, within one loaded model.

The adapters that it is computed with change every key and value, so cells of one set of adapters are worthless,
and wrong, for another. Whoever looks for a prefix to start from compares identities first, then tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final


@dataclass(frozen=True, slots=True)
class KVIdentity:
    """The adapters in use: (digest, scale), in the order of digests; none has the scale 0."""

    loras: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, scaled: Iterable[tuple[str, float]]) -> KVIdentity:
        """What (digest, scale) pairs amount to. An adapter that is named twice has the sum of both scales."""
        sums: dict[str, float] = {}
        for digest, scale in scaled:
            sums[digest] = sums.get(digest, 0.0) + scale
        used = tuple(sorted((digest, exact) for digest, scale in sums.items() if (exact := as_float32(scale))))
        return cls(used) if used else BASE

    @property
    def mark(self) -> bytes:
        """16 bytes that differ where identities do; zeros for the model itself. For labels of saved states."""
        if not self.loras:
            return bytes(16)
        return blake2b(repr(self.loras).encode(), digest_size=16).digest()


BASE: Final = KVIdentity()
"""The model itself, without adapters."""


def as_float32(number: float) -> float:
    """`number` as C will read it: two scales that differ in Python only are one."""
    exact: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return exact
