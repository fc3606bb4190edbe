"""What the books decided, done to the engine; and checkpoints, taken where a prompt has come to a boundary.

Neither may cost a request. A state that cannot be restored leaves its sequence empty, which the books are
told, so its tokens are decoded again; one that cannot be saved is not kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import assert_never

from llama_worker._engine.base import StateError
from llama_worker._engine.state import kv_mark
from llama_worker._errors import GenerationError
from llama_worker._generation import Generation
from llama_worker._prefix_cache import Clear, KVOp, Restore, Save, Share, Trim
from llama_worker._scheduler import Batch
from llama_worker._service import Loaded

logger = logging.getLogger("llama_worker")


def apply(loaded: Loaded, ops: Iterable[KVOp]) -> None:
    """Carry out `ops`, in order. Raises GenerationError when the engine cannot do what its limits promise."""
    engine, cache = loaded.engine, loaded.scheduler.cache
    for op in ops:
        match op:
            case Clear(seq):
                engine.seq_clear(seq)
            case Trim(seq, length):
                if engine.seq_end(seq) < length:  # a restore before this op failed
                    cache.lost(seq)
                elif not engine.seq_trim(seq, length):
                    raise GenerationError(f"the engine could not trim sequence {seq} to {length} tokens")
            case Share(source, target, length):
                engine.seq_share(source, target, length)
            case Restore():
                _restore(loaded, op)
            case Save():
                _save(loaded, op)
            case _:
                assert_never(op)


def seat(loaded: Loaded, generation: Generation, ops: Iterable[KVOp]) -> None:
    """Make the slot that `generation` was given hold what the books say, or nothing."""
    apply(loaded, ops)
    generation.cached = min(generation.cached or 0, generation.n_resident)


def rewind(loaded: Loaded, generation: Generation) -> int:
    """Its sequence is spoiled: go back to the last checkpoint, or to nothing. Returns how many tokens are left."""
    slot = generation.slot
    assert slot is not None
    apply(loaded, [loaded.scheduler.cache.rewind(slot)])
    return slot.n


def take_checkpoints(loaded: Loaded, batch: Batch) -> None:
    """Save the sequences of `batch`, just decoded, that have come to a boundary of their prompts."""
    if not loaded.engine.limits.needs_checkpoints:
        return
    for generation in batch.parts:
        if generation.slot is not None and generation.is_at_boundary:
            _take_checkpoint(loaded, generation)


def _take_checkpoint(loaded: Loaded, generation: Generation) -> None:
    cache, slot = loaded.scheduler.cache, generation.slot
    assert slot is not None
    if not cache.wants_checkpoint(slot):
        return
    try:
        state = loaded.engine.seq_save(slot.seq, partial=True)
    except (StateError, MemoryError) as exc:
        logger.warning("no checkpoint at %d tokens: %s", slot.n, exc)
        cache.checkpoints.failed()
        return
    cache.keep_checkpoint(slot, state)


def _save(loaded: Loaded, op: Save) -> None:
    cache = loaded.scheduler.cache
    try:
        cache.keep_saved(op, loaded.engine.seq_save(op.seq))
    except (StateError, MemoryError) as exc:
        logger.warning("%d tokens are not kept: %s", len(op.tokens), exc)
        cache.checkpoints.failed()


def _restore(loaded: Loaded, op: Restore) -> None:
    try:
        if kv_mark(op.state) != loaded.scheduler.cache.slots[op.seq].kv.mark:
            raise StateError("the state was computed with other adapters")
        loaded.engine.seq_restore(op.seq, op.state, op.length, donor=op.donor)
    except (StateError, MemoryError) as exc:
        logger.warning("%d tokens are decoded again: %s", op.length, exc)
        loaded.engine.seq_clear(op.seq)
        loaded.scheduler.cache.lost(op.seq)
