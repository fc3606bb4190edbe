"""What this process takes from the machine, and whether that grows."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Usage:
    """`rss` in MiB, after Python and malloc have given back what they can."""

    rss: float
    threads: int
    files: int


def usage() -> Usage:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    process = psutil.Process()
    return Usage(process.memory_info().rss / _MIB, process.num_threads(), process.num_fds())


def slope(series: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Theil and Sen's: the median slope over all pairs of points, each pair from one of the series.

    Half of the points may be wild without changing it much.
    """
    pairs = itertools.chain.from_iterable(itertools.combinations(points, 2) for points in series)
    return statistics.median([(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs])
