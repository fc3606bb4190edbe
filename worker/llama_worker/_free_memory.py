"""How much memory there is to take: RAM within the limits of control groups, and what each device has free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from llama_worker._config import ModelConfig
from llama_worker._engine.devices import free_device_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """Free bytes of RAM and of each device that layers can be offloaded to."""

    ram: int
    devices: tuple[int, ...] = ()

    def with_returned(self, *, ram: int, device: int) -> FreeMemory:
        """What will be free when another model has given back so much; devices are thought to share alike."""
        share = device // max(len(self.devices), 1)
        return FreeMemory(ram=self.ram + ram, devices=tuple(free + share for free in self.devices))

    def spread(self, config: ModelConfig) -> tuple[int, int]:
        """How many devices `config` spreads layers over, and the bytes they take until the first one is full."""
        devices = self.devices
        if not devices or config.n_gpu_layers == 0:
            return 0, 0
        if config.split_mode == "none":
            return 1, devices[min(config.main_gpu, len(devices) - 1)]
        shares = (config.tensor_split or ())[: len(devices)]
        most = max(shares, default=0.0)
        if not most:  # llama.cpp then gives each device layers by what it has free
            return len(devices), sum(devices)
        used = [(free, share / most) for free, share in zip(devices, shares, strict=False) if share / most]
        whole = sum(share for _, share in used)
        return len(used), min(int(min(free * whole / share, 2.0**62)) for free, share in used)


def free_memory() -> FreeMemory:
    """What is free now. Milliseconds; any thread. Raises EngineVersionError."""
    return FreeMemory(ram=free_ram_bytes(), devices=free_device_bytes())


def free_ram_bytes(cgroup: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """RAM that this process may still take: the machine's, or less where a container's limit says so."""
    rooms = (limit - used for limit, used in _cgroup_limits(cgroup, membership))
    return max(0, min([int(psutil.virtual_memory().available), *rooms]))


def _cgroup_limits(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, use) of each control group around this process that has a limit, version 2 and 1."""
    for version_root, names, path in _cgroups(root, membership):
        folder = version_root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(version_root):
                break
            limit, used = _number(group / names[0]), _number(group / names[1])
            if limit is not None and used is not None:
                yield limit, max(0, used - _reclaimable(group))


def _cgroups(root: Path, membership: Path) -> Iterator[tuple[Path, tuple[str, str], str]]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield root, ("memory.max", "memory.current"), path
        elif "memory" in controllers.split(","):
            yield root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), path


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _reclaimable(group: Path) -> int:
    """File cache that the kernel gives back before it refuses memory."""
    try:
        found = re.search(r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
