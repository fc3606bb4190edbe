"""What is kept, copied out of the worker thread's hands and into them: Export and Import, served between two steps.

They wait here, in order, until they can be served: for a model to be loaded, or for an idle slot.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from llama_worker._commands import Export, Import, Transfer, settle
from llama_worker._disk import Disk
from llama_worker._disk_tier import DiskTier
from llama_worker._engine.base import StateError
from llama_worker._entry import WORTH_SAVING, Entry
from llama_worker._errors import copy_of
from llama_worker._identity import KVIdentity
from llama_worker._kv_ops import apply
from llama_worker._other_load import OtherLoad, mark_of
from llama_worker._scheduler import Scheduler
from llama_worker._service import Loaded, Service
from llama_worker._slot import Slot
from llama_worker._start import NEARLY_WHOLE
from llama_worker._tokens import TokenIds, common_prefix
from llama_worker._view import ModelView

logger = logging.getLogger("llama_worker")


def serve_transfers(service: Service) -> None:
    """Answer those that can be answered now."""
    service.transfers[:] = [transfer for transfer in service.transfers if not _serve(service, transfer)]


def wants_model(service: Service) -> bool:
    """Whether a model that was let go has to be loaded for an Import. An Export is content: nothing is kept then."""
    if service.loaded is not None or service.change is not None or service.refusal is not None:
        return False
    return any(isinstance(transfer, Import) for transfer in service.transfers)


def _serve(service: Service, transfer: Transfer) -> bool:
    loaded = service.loaded
    if loaded is None and service.refusal is not None:
        transfer.fail(copy_of(service.refusal))
    elif loaded is None and (service.change is not None or isinstance(transfer, Import)):
        return False
    elif loaded is None:
        settle(transfer.answer, result=())
    elif not _is_meant(loaded, transfer):
        transfer.fail(OtherLoad(loaded.view))
    elif isinstance(transfer, Import):
        settle(transfer.answer, result=sum(_take_in(loaded, entry) for entry in transfer.entries))
    elif transfer.tokens is None:
        settle(transfer.answer, result=tuple(_everything_kept(loaded))[::-1])
    elif not loaded.scheduler.cache.has_idle:
        return False
    else:
        settle(transfer.answer, result=tuple(_longest(loaded, transfer)))
    return True


def _is_meant(loaded: Loaded, transfer: Transfer) -> bool:
    """Whether `transfer` was made for this load of a model, or for one whose states are the same."""
    if loaded.view.epoch == transfer.epoch:
        return True
    return isinstance(transfer, Import) and transfer.mark is not None and transfer.mark == mark_of(loaded.view)


def open_disk(service: Service, view: ModelView, scheduler: Scheduler) -> Disk | None:
    """The folder of the model that is about to be served, for its `scheduler`; None where there is none."""
    config, limits = view.config, view.limits
    if config.cache_dir is None or not limits.can_save:
        return None
    disk = Disk(view, config.cache_dir, config.cache_disk << 20, service.channel.nudge)
    tier = DiskTier(disk, can_trim=limits.can_trim_restored, n_ctx=limits.n_ctx, clock=service.clock)
    scheduler.disk = scheduler.cache.tier.overflow = tier
    return disk


def shelve(loaded: Loaded) -> None:
    """The model is let go: what was used last goes to the disk, as much as may wait to be written."""
    disk, tier = loaded.disk, loaded.scheduler.disk
    if disk is None or tier is None:
        return
    chosen, room = [], disk.room
    for entry in _everything_kept(loaded):
        room -= entry.n_bytes
        if room < 0:
            break
        chosen.append(entry)
    for entry in reversed(chosen):
        tier.keep(entry)


def _everything_kept(loaded: Loaded) -> Iterator[Entry]:
    """All that is worth keeping, those used last first. What slots hold is copied, one after the other."""
    cache = loaded.scheduler.cache
    slots = [slot for slot in cache.slots if _is_worth_it(slot, cache.slots)]
    saved = [entry for entry in cache.tier.entries if not any(_holds(slot, entry.tokens, entry.kv) for slot in slots)]
    both: list[Slot | Entry] = [*slots, *saved]
    for kept in sorted(both, key=lambda kept: kept.last_used, reverse=True):
        entry = kept if isinstance(kept, Entry) else _copied(loaded, kept)
        if entry is not None:
            yield entry


def _is_worth_it(slot: Slot, slots: list[Slot]) -> bool:
    """Whether nobody else holds all of it; of two that hold the same, the first."""
    if slot.n < WORTH_SAVING:
        return False
    better = [other for other in slots if other.n > slot.n or (other.n == slot.n and other.seq < slot.seq)]
    return not any(_holds(other, slot.tokens.view, slot.kv) for other in better)


def _holds(slot: Slot, tokens: TokenIds, kv: KVIdentity) -> bool:
    return slot.kv == kv and common_prefix(slot.tokens.view, tokens) == len(tokens)


def _longest(loaded: Loaded, command: Export) -> Iterator[Entry]:
    """As much of the tokens as is kept anywhere, and nothing behind them; who is asked keeps what he has."""
    assert command.tokens is not None
    cache = loaded.scheduler.cache
    source, length = cache.find_longest(command.tokens, command.kv)
    if source is None:
        return
    if source.n == length:
        entry = _copied(loaded, source) if isinstance(source, Slot) else source
    else:
        entry = _beside(loaded, source, length) or _in_between(loaded, source, length)
    if entry is not None:
        yield entry


def _beside(loaded: Loaded, source: Slot | Entry, length: int) -> Entry | None:
    """The first `length` tokens of `source`, from an empty slot; None where there is none."""
    cache = loaded.scheduler.cache
    loan = cache.lend_copy(source, length)
    if loan is None:
        return None
    try:
        apply(loaded, loan.ops)
        entry = _copied(loaded, loan.slot) if loan.slot.n else None
        apply(loaded, [cache.forget(loan.slot)])
    finally:
        cache.give_back(loan.slot)
    return entry


def _in_between(loaded: Loaded, source: Slot | Entry, length: int) -> Entry | None:
    """The same from a slot that is saved whole and gets back what it held.

    Where it could not, it gives up a short tail, which is soon decoded again; None if that is not enough.
    """
    cache = loaded.scheduler.cache
    aside = cache.put_aside(source, lambda slot: None if (kept := _copied(loaded, slot)) is None else kept.state)
    if aside is None:
        if not isinstance(source, Slot) or source.busy or source.n - length > NEARLY_WHOLE:
            return None
        apply(loaded, [cache.cut(source, length)])
        return _copied(loaded, source) if source.n else None
    if aside.slot is source:
        apply(loaded, [cache.cut(aside.slot, length)])
        entry = _copied(loaded, aside.slot) if aside.slot.n else None
    else:
        apply(loaded, [cache.forget(aside.slot)])
        entry = _beside(loaded, source, length)
    apply(loaded, cache.put_back(aside))
    return entry


def _copied(loaded: Loaded, slot: Slot) -> Entry | None:
    try:
        state = loaded.engine.seq_save(slot.seq)
    except (StateError, MemoryError) as exc:
        logger.warning("%d tokens are not copied: %s", slot.n, exc)
        loaded.scheduler.cache.checkpoints.failed()
        return None
    return Entry(slot.tokens.view.copy(), state, tuple(slot.checkpoints), slot.last_used, slot.kv)


def _take_in(loaded: Loaded, entry: Entry) -> bool:
    cache, limits = loaded.scheduler.cache, loaded.engine.limits
    if entry.n > limits.n_ctx:
        return False
    ops = cache.take_in(entry)
    apply(loaded, ops or ())
    return ops is not None
