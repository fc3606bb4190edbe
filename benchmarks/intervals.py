"""Medians and their 90 % intervals, from order statistics: no assumption on how the figures scatter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """The median of `n` figures; it lies in low … high with the probability `coverage`.

    With fewer than 5 figures even their whole range covers less than 90 %.
    """

    median: float
    low: float
    high: float
    n: int
    coverage: float


def interval(figures: Sequence[float]) -> Interval:
    """The narrowest symmetric interval of order statistics that covers the median with CONFIDENCE."""
    ordered, n = sorted(figures), len(figures)
    rank = max((k for k in range((n + 1) // 2) if _coverage(n, k) >= CONFIDENCE), default=0)
    covered = _coverage(n, rank)
    return Interval(median=median(ordered), low=ordered[rank], high=ordered[n - 1 - rank], n=n, coverage=covered)


def _coverage(n: int, rank: int) -> float:
    """How probably the true median lies between the rank-th smallest and the rank-th largest (from 0) of n."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(rank + 1)) / 2**n
