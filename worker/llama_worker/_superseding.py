"""What a file makes needless: those that it leads to as well."""

from __future__ import annotations

from llama_worker._disk_store import DiskStore
from llama_worker._entry import Entry


def supersede(store: DiskStore, entry: Entry, *, can_trim: bool) -> None:
    """Remove what the index of `store` knows and `entry`, which is written, leads to. `can_trim` as the RAM tier's."""
    for shelved in [shelved for shelved in store.index if shelved.kv == entry.kv]:
        if len(shelved.tokens) < entry.n and entry.leads_to_all(shelved.tokens, can_trim=can_trim):
            store.remove(shelved)
