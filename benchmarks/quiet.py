"""How much of the machine others used meanwhile. Two computing threads wait for each other at every node of the
graph, so a neighbour with a quarter of one core can halve the figures of whoever runs just then.
"""

from __future__ import annotations

import resource
import time

import psutil

TOLERATED = 0.05
"""Share of all cores that others may use before a run counts as disturbed."""


class Meter:
    """From its creation on, watches what the processes outside this one and its children use."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._others = _others()

    def disturbance(self) -> float:
        """Share of all cores, 0 … 1, that others used since. Finished children count as ours."""
        elapsed = time.monotonic() - self._began
        return max(0.0, _others() - self._others) / (elapsed * (psutil.cpu_count() or 1))


def _others() -> float:
    """CPU seconds since boot that were not ours."""
    machine = psutil.cpu_times()
    busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in own)
