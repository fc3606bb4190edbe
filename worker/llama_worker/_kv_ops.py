"""What the books decided, done to the engine; and checkpoints, taken where a prompt has come to a boundary.

Neither may cost a request. A state that cannot be restored leaves its sequence empty, which the books are
told, so its tokens are decoded again; one that cannot be saved is not kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import assert_never

from llama_worker._engine.base import StateError
from llama_worker._engine.state import kv_mark
from llama_worker._generation import Generation
from llama_worker._scheduler import Batch
from llama_worker._seq_ops import Clear, KVOp, Restore, Save, Share, Trim
from llama_worker._service import Loaded

logger = logging.getLogger("llama_worker")


def apply(loaded: Loaded, ops: Iterable[KVOp]) -> None:
    """Carry out `ops`, in order. What the engine cannot do leaves a sequence empty, and the cache is told."""
    engine, cache = loaded.engine, loaded.scheduler.cache
    for op in ops:
        match op:
            case Clear(seq):
                engine.seq_clear(seq)
            case Trim(seq, length):
                if engine.seq_end(seq) < length:  # a restore before this op failed
                    cache.lost(seq)
                elif not engine.seq_trim(seq, length):
                    _forget(loaded, seq, f"{length} tokens are decoded again: what follows them cannot be cut off")
            case Share(source, target, length):
                try:
                    engine.seq_share(source, target, length)
                except StateError as exc:
                    _forget(loaded, target, f"{length} tokens are decoded again: {exc}")
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


def rewind_lost(loaded: Loaded) -> None:
    """A decode broke off: go back with those sequences, too, that lost their states and had no part in it."""
    cache = loaded.scheduler.cache
    for slot in cache.slots:
        if loaded.engine.seq_end(slot.seq) < slot.n:
            apply(loaded, [cache.rewind(slot)])


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
    begun = time.perf_counter()
    try:
        cache.keep_saved(op, loaded.engine.seq_save(op.seq))
        cache.tier.thrift.saving.observe(len(op.tokens), time.perf_counter() - begun)
    except (StateError, MemoryError) as exc:
        logger.warning("%d tokens are not kept: %s", len(op.tokens), exc)
        cache.checkpoints.failed()


def _restore(loaded: Loaded, op: Restore) -> None:
    begun = time.perf_counter()
    try:
        if kv_mark(op.state) != loaded.scheduler.cache.slots[op.seq].kv.mark:
            raise StateError("the state was computed with other adapters")
        loaded.engine.seq_restore(op.seq, op.state, op.length, donor=op.donor)
        loaded.scheduler.cache.tier.thrift.restoring.observe(op.length, time.perf_counter() - begun)
    except (StateError, MemoryError) as exc:
        _forget(loaded, op.seq, f"{op.length} tokens are decoded again: {exc}")


def _forget(loaded: Loaded, seq: int, why: str) -> None:
    """The engine could not do what the books say. When cells are short, each kind of sliding window drops some."""
    logger.warning(why)
    loaded.engine.seq_clear(seq)
    loaded.scheduler.cache.lost(seq)
