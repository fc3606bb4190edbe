"""How many CPU threads pay: physical cores, as far as this process may use them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil


def usable_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Physical cores, capped by the process's CPU affinity and its container's CPU quota; at least 1."""
    caps = [psutil.cpu_count(logical=False), _affinity(), _quota(cpu_max)]
    return max(1, min((cap for cap in caps if cap), default=1))


def _affinity() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _quota(cpu_max: Path) -> int | None:
    try:
        quota, period = cpu_max.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return None
