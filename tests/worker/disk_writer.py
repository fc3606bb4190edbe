"""A process that fills a DiskStore until it is killed, and says what is safely there: one name a line.

What it writes follows from numbers, so that a reader can tell whether it got back what was written.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import numpy as np

from llama_worker._disk_store import DiskStore
from llama_worker._saved_prefix import SavedPrefix

FINGERPRINT = bytes(range(16))


def prefix(number: int) -> SavedPrefix:
    """The `number`-th: some hundred tokens, and states of some 100 kB to 1 MB."""
    random = np.random.default_rng(number)
    tokens = random.integers(0, 1000, int(random.integers(128, 600)), dtype=np.int32)
    tokens[0] = number
    state = random.integers(0, 256, int(random.integers(100_000, 1_000_000)), dtype=np.uint8)
    return SavedPrefix(FINGERPRINT, tokens, state, ((50, state[:1000]), (100, state[:2000])))


def main(folder: str, budget: str) -> None:
    store = DiskStore(Path(folder), FINGERPRINT, int(budget) or None)
    for number in count():
        assert store.write(prefix(number))
        print(number, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
