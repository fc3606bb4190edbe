"""RowScan: the same answer in both ways of looking, and the careful one for as long as it is needed."""

from __future__ import annotations

import numpy as np
import pytest

from llama_worker import GenerationError
from llama_worker._engine.rows import RowScan


class Clock:
    """Each look takes `seconds`."""

    def __init__(self) -> None:
        self.now, self.seconds = 0.0, 1e-5

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.fixture(params=[False, True], ids=["fast", "careful"])
def scan(request: pytest.FixtureRequest) -> RowScan:
    clock = Clock()
    scan = RowScan(clock)
    if request.param:
        clock.seconds = 0.005
        scan.require_finite(np.zeros(10, np.float32))
    return scan


def row(*changes: tuple[int, float]) -> np.ndarray:
    logits = np.random.default_rng(0).normal(size=1300).astype(np.float32)
    for index, value in changes:
        logits[index] = value
    return logits


@pytest.mark.parametrize("index", [0, 499, 500, 1299])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_whatever_is_no_number_is_found_wherever_it_is(scan: RowScan, index: int, value: float) -> None:
    with pytest.raises(GenerationError, match="not finite"):
        scan.require_finite(row((index, value)))


def test_banned_tokens_are_allowed_also_five_hundred_in_a_row(scan: RowScan) -> None:
    banned = [(index, float("-inf")) for index in range(500, 1000)]
    scan.require_finite(row(*banned))
    with pytest.raises(GenerationError, match="not finite"):  # they hide nothing
        scan.require_finite(row(*banned, (750, float("nan"))))


def test_the_greatest_is_found_until_the_gil_was_lost() -> None:
    clock = Clock()
    scan = RowScan(clock)
    assert scan.greatest(row((700, 99.0))) == 700
    clock.seconds = 0.005
    assert scan.greatest(row((700, 99.0))) == 700
    clock.seconds = 1e-5
    looks = [scan.greatest(row((700, 99.0))) for _ in range(1000)]
    assert looks == [None] * 999 + [700]


def test_a_greatest_that_is_no_number_is_refused() -> None:
    with pytest.raises(GenerationError, match="not finite"):
        RowScan().greatest(row((700, float("nan"))))
