"""Loan: a slot in the hands of a generation; and Aside, what a slot held that is used for something else meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from llama_worker._checkpoints import Checkpoint
from llama_worker._engine.base import SavedState
from llama_worker._entry import Entry
from llama_worker._identity import KVIdentity
from llama_worker._pins import Pin
from llama_worker._seq_ops import KVOp
from llama_worker._slot import Slot
from llama_worker._tokens import TokenIds


@dataclass(frozen=True, slots=True)
class Loan:
    """A slot for a prompt, how many of the prompt's tokens it holds already, and what the engine must do.

    `recalled` is the entry that it was restored from, if it was.
    """

    slot: Slot
    reused: int
    ops: tuple[KVOp, ...]
    recalled: Entry | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Aside:
    """What `slot` holds, while it is used for something else: see `PrefixCache.put_aside`."""

    slot: Slot
    tokens: TokenIds
    state: SavedState
    kv: KVIdentity
    checkpoints: tuple[Checkpoint, ...]
    pins: tuple[tuple[Pin, int], ...]
    continued: bool
    last_used: int
