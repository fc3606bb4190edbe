"""The ledger of cells says of a tree of sequences what counting says."""

import random

import numpy as np
import pytest

from llama_worker._cells import Cells
from llama_worker._tokens import common_prefix


@pytest.mark.parametrize("seed", range(30))
def test_a_ledger_agrees_with_counting(seed: int):
    rng = random.Random(seed)
    ledger, held = Cells(200), [np.empty(0, np.int32) for _ in range(5)]
    for _ in range(60):
        i, other = rng.randrange(5), rng.randrange(5)
        match rng.choice(["grow", "one", "cut", "share"]):
            case "grow":
                held[i] = np.concatenate([held[i], ledger.take(min(ledger.free, rng.randrange(40)))])
            case "one" if ledger.free:
                held[i] = np.append(held[i], np.int32(ledger.take_one()))
            case "cut":
                length = rng.randrange(len(held[i]) + 1)
                ledger.drop(held[i][length:])
                held[i] = held[i][:length]
            case "share" if i != other and not len(held[i]):
                held[i] = held[other][: rng.randrange(len(held[other]) + 1)].copy()
                ledger.hold(held[i])
        counted = np.bincount(np.concatenate(held), minlength=200)
        assert ledger.holders().tolist() == counted.tolist()
        assert (ledger.free, ledger.used) == ((counted == 0).sum(), (counted > 0).sum())
        for cells in held:
            assert ledger.n_shared(cells) == (counted[cells] > 1).sum()


def test_more_cells_than_are_free_are_never_given():
    ledger = Cells(3)
    ledger.take(2)
    with pytest.raises(AssertionError):
        ledger.take(2)
    ledger.take_one()
    with pytest.raises(AssertionError):
        ledger.take_one()


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 255, 256, 257, 5000])
def test_a_common_prefix_is_found_at_every_length(n: int):
    """It is sought in ever longer pieces: their borders are where an error of one would show."""
    a = np.arange(n + 3, dtype=np.int32)
    b = a.copy()
    b[n] += 1
    assert common_prefix(a, b) == common_prefix(b, a) == n
    assert common_prefix(a[:n], a) == common_prefix(a, a[:n]) == n
