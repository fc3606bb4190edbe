"""A session as bytes: what it holds, and the KV of its tokens as the worker exported it.

    magic, version, bytes of the description, bytes of the tokens    then all three, one after another
    description                                                      JSON: messages, tools, manifest, date
    tokens                                                           int32, little-endian
    states                                                           a saved prefix (see `_saved_prefix`), or nothing
    digest                                                           of everything before

The messages are in it as text. Nothing is believed before it is checked, and nothing is changed before all is
believed; the digest finds damage, not malice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from hashlib import blake2b
from math import isfinite
from typing import Any, Final

import numpy as np

from llama_worker._errors import InvalidRequestError, LlamaWorkerError, StateError
from llama_worker._manifest import Manifest, RuntimeIdentity, Segment, token_digest
from llama_worker._requests import Message, ToolSpec
from llama_worker._session_jobs import Held
from llama_worker._tokens import TokenIds

VERSION: Final = 1
_MAGIC: Final = b"LWSS"
_HEAD: Final = struct.Struct("<4sIQQ")
_DIGEST: Final = 32
_ODD: Final = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, LlamaWorkerError)
_JSON: Final = {"str": str, "int": int, "bool": bool}
_DESCRIBED: Final = {
    "today": "str",
    "prefix": "tuple",
    "tools": "tuple",
    "suffix": "tuple",
    "n_computed": "int",
    "is_chat": "bool",
    "manifest": "dict",
}
"""The fields of a description and their kinds, as annotations write them; a tuple is a list in JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """What a session held on the day `today` of its prompts; `states` is empty where no KV was kept."""

    held: Held
    today: date
    states: bytes

    def to_bytes(self) -> bytes:
        held = self.held
        described = json.dumps(
            {
                "today": self.today.isoformat(),
                "prefix": [message.model_dump(mode="json") for message in held.prefix],
                "tools": [tool.model_dump(mode="json") for tool in held.tools],
                "suffix": [message.model_dump(mode="json") for message in held.suffix],
                "n_computed": held.n_computed,
                "is_chat": held.is_chat,
                "manifest": asdict(held.manifest),
            }
        ).encode()
        tokens = np.ascontiguousarray(held.tokens, "<i4").tobytes()
        whole = _HEAD.pack(_MAGIC, VERSION, len(described), len(tokens)) + described + tokens + self.states
        return whole + _digest(whole)

    @classmethod
    def parsed(cls, data: bytes) -> SessionState:
        """What `to_bytes` gave. Raises StateError, InvalidRequestError for what is no bytes."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidRequestError("data", type(data).__name__, "give the bytes that export_state returned")
        data = bytes(data)
        whole, digest = data[:-_DIGEST], data[-_DIGEST:]
        if len(whole) < _HEAD.size or whole[: len(_MAGIC)] != _MAGIC:
            raise StateError(f"these {len(data)} bytes are no exported session")
        _, version, n_described, n_tokens = _HEAD.unpack_from(whole)
        if version != VERSION:
            raise StateError(f"the session was exported in form {version}, this version reads {VERSION}")
        if _HEAD.size + n_described + n_tokens > len(whole) or n_tokens % 4 or _digest(whole) != digest:
            raise StateError(f"the exported session of {len(data)} bytes is damaged or cut off")
        at = _HEAD.size + n_described
        try:
            return _described(json.loads(whole[_HEAD.size : at]), whole[at : at + n_tokens], whole[at + n_tokens :])
        except _ODD as exc:
            raise StateError(f"the exported session is not what this version reads ({type(exc).__name__})") from exc


def _described(described: Any, ids: bytes, states: bytes) -> SessionState:
    _require_kinds(described, _DESCRIBED)
    tokens = np.frombuffer(ids, "<i4").astype(np.int32)
    manifest = _manifest(described["manifest"])
    n_computed = described["n_computed"]
    if not (0 <= manifest.n_prefix <= manifest.n_tokens == len(tokens) and 0 <= n_computed <= len(tokens)):
        raise ValueError("its parts do not fit together")
    if manifest.prefix_digest != token_digest(tokens[: manifest.n_prefix]):
        raise ValueError("its prefix is another")
    _check_segments(manifest, tokens)
    held = Held(
        tokens=tokens,
        n_computed=n_computed,
        manifest=manifest,
        prefix=tuple(Message(**message) for message in described["prefix"]),
        tools=tuple(ToolSpec(**tool) for tool in described["tools"]),
        suffix=tuple(Message(**message) for message in described["suffix"]),
        is_chat=described["is_chat"],
    )
    return SessionState(held, date.fromisoformat(described["today"]), states)


def _manifest(given: Any) -> Manifest:
    _require_kinds(given, Manifest.__annotations__)
    _require_kinds(given["identity"], RuntimeIdentity.__annotations__)
    for segment in given["segments"]:
        _require_kinds(segment, Segment.__annotations__)
    loras = tuple((str(digest), float(scale)) for digest, scale in given["identity"]["loras"])
    if not all(isfinite(scale) for _, scale in loras):
        raise ValueError("a scale is no number")
    return Manifest(
        identity=RuntimeIdentity(**{**given["identity"], "loras": loras}),
        segments=tuple(Segment(**segment) for segment in given["segments"]),
        n_prefix=given["n_prefix"],
        n_tokens=given["n_tokens"],
        prefix_digest=given["prefix_digest"],
    )


def _require_kinds(given: Any, kinds: Mapping[str, Any]) -> None:
    """Raises TypeError unless `given` has just these fields, each of its kind in JSON."""
    if not isinstance(given, dict) or set(given) != set(kinds):
        raise TypeError("other fields than it should have")
    for name, kind in kinds.items():
        if type(given[name]) is not _JSON.get(kind, list if kind.startswith("tuple") else dict):
            raise TypeError(f"{name} is of another kind")


def _check_segments(manifest: Manifest, tokens: TokenIds) -> None:
    """Raises ValueError unless they follow one another and are of these tokens."""
    start = 0
    for segment in manifest.segments:
        if not start <= segment.start < segment.end <= len(tokens):
            raise ValueError("its segments overlap, or reach too far")
        if segment.digest != token_digest(tokens[segment.start : segment.end]):
            raise ValueError("a segment is of other tokens")
        start = segment.end


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST).digest()
