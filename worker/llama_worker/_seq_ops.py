"""KVOp: what is to be done to the sequences of the engine, in order. The books decide it, `_kv_ops` carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from llama_worker._checkpoints import Checkpoint
from llama_worker._engine.base import SavedState
from llama_worker._identity import KVIdentity
from llama_worker._tokens import TokenIds


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget sequence `seq`."""

    seq: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Keep the first `length` tokens of `seq`."""

    seq: int
    length: int


@dataclass(frozen=True, slots=True)
class Share:
    """Let the empty `target` hold the first `length` tokens of `source`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Restore:
    """Let `seq` hold the `length` tokens that `state` was saved of: its own first ones, if the state is partial.

    With `donor`, to that sequence's first tokens, whose cells the empty `seq` shares from now on. It may fail:
    then `seq` is empty, and the cache has to be told (`lost`).
    """

    seq: int
    length: int
    state: SavedState
    donor: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Save:
    """Keep what `seq` holds, these `tokens` with their `checkpoints`, before it is gone. It may fail.

    `continued`: whether a prompt had taken the sequence over before; None when it is sure to come back. `last_used`:
    its slot's, when this was decided.
    """

    seq: int
    tokens: TokenIds
    checkpoints: tuple[Checkpoint, ...]
    kv: KVIdentity
    continued: bool | None = None
    last_used: int = 0


KVOp: TypeAlias = Clear | Trim | Share | Restore | Save
