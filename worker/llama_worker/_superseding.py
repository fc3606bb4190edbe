"""What a file makes needless: those that it leads to as well."""

from __future__ import annotations

from llama_worker._disk_store import DiskStore
from llama_worker._entry import Entry
from llama_worker._tokens import common_prefix


def supersede(store: DiskStore, entry: Entry, *, can_trim: bool) -> None:
    """Remove what the index of `store` knows and `entry`, which is written, leads to. `can_trim` as the RAM tier's."""
    places = {checkpoint.length for checkpoint in entry.checkpoints}
    for shelved in [shelved for shelved in store.index if shelved.kv == entry.kv]:
        n = len(shelved.tokens)
        if n < entry.n and (can_trim or n in places) and common_prefix(shelved.tokens, entry.tokens) == n:
            store.remove(shelved)
