"""Whether a model fits into this machine's memory, decided before anything is allocated.

The KV cache is computed exactly, compute buffers are estimated on the high side. Weights that are mapped
from the file are lent by the page cache, which gives them back under pressure: they are shown, but only
KV and buffers must fit. With load_mode "none", "mlock" or "direct_io" the weights must fit too.

Layers on a GPU need that device's memory, which llama.cpp itself checks; they are left out here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from llama_worker._config import ModelConfig
from llama_worker._engine.base import ModelInfo
from llama_worker._engine.header import Header, gpu_available
from llama_worker._errors import InsufficientMemoryError
from llama_worker._models import read_model

# Type -> bytes of one block and elements in it.
_BLOCKS: Final[Mapping[str, tuple[int, int]]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_0": (22, 32),
    "q5_1": (24, 32),
    "q4_0": (18, 32),
    "q4_1": (20, 32),
    "iq4_nl": (18, 32),
}
_FLOAT: Final = 4
_CELL_STEP: Final = 256
_MAPPED_MODES: Final = frozenset({"auto", "mmap"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of RAM. `n_cells` is the number of tokens that the KV cache holds.

    `kv` includes the states of recurrent layers. `weights_resident` says whether the weights must fit,
    or are mapped and may be paged.
    """

    weights: int
    kv: int
    compute: int
    available: int
    installed: int
    n_cells: int
    weights_resident: bool

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute

    @property
    def needed(self) -> int:
        """What must be free before the model is opened."""
        return self.total if self.weights_resident else self.kv + self.compute


def check_fits(info: ModelInfo, config: ModelConfig, *, freed: int = 0) -> MemoryPlan:
    """The plan, if it fits. Allocates nothing; milliseconds; any thread.

    `freed`: bytes that will be given back first, when this model replaces another.
    Raises InsufficientMemoryError with the arithmetic and the way out, and what `read_model` raises.
    """
    memory = plan(info, config)
    available = memory.available + freed
    if memory.needed > available:
        raise InsufficientMemoryError(refusal(info, config, memory, freed), needed=memory.needed, available=available)
    return memory


def plan(info: ModelInfo, config: ModelConfig) -> MemoryPlan:
    """What `config` would need of the model that `info` describes. Raises what `read_model` raises."""
    file = read_model(Path(info.path))
    on_cpu = _share_on_cpu(info, config)
    n_cells = 0 if _is_encoder(info, file.header) else _n_cells(info, config)
    kv = _kv_bytes(info, config, file.header, n_cells)
    return MemoryPlan(
        weights=int(on_cpu * sum(header.n_bytes for header in file.headers)),
        kv=int((on_cpu if config.offload_kqv else 1.0) * kv),
        compute=_compute_bytes(info, config, file.header, n_cells),
        available=available_bytes(),
        installed=_installed_bytes(),
        n_cells=n_cells,
        weights_resident=config.load_mode not in _MAPPED_MODES,
    )


def _share_on_cpu(info: ModelInfo, config: ModelConfig) -> float:
    if config.n_gpu_layers == 0 or not gpu_available():
        return 1.0
    layers = info.n_layer + 1  # the output layer counts as one
    offloaded = layers if config.n_gpu_layers < 0 else min(layers, config.n_gpu_layers)
    return 1.0 - offloaded / layers


def _is_encoder(info: ModelInfo, header: Header) -> bool:
    """Whether attention looks both ways, so that nothing is kept from one batch to the next."""
    return header.values.get(f"{info.architecture}.attention.causal") is False or (
        info.is_embedding and "bert" in info.architecture
    )


def _n_cells(info: ModelInfo, config: ModelConfig) -> int:
    cells = config.n_batch if info.is_embedding else config.n_kv_cells or config.n_ctx or info.n_ctx_train
    return _padded(cells)


def _padded(cells: int) -> int:
    return -(-cells // _CELL_STEP) * _CELL_STEP


# --- KV cache and recurrent states


def _kv_bytes(info: ModelInfo, config: ModelConfig, header: Header, n_cells: int) -> int:
    if not n_cells:
        return 0
    kv_heads = _kv_heads(info, header)
    attention = sum(
        _layer_bytes(info, config, header, heads, cells)
        for heads, cells in zip(kv_heads, _layer_cells(info, config, header, n_cells), strict=True)
        if heads
    )
    n_stateful = sum(heads == 0 for heads in kv_heads) if any(kv_heads) else info.n_layer
    state = _state_bytes(info, header) * n_stateful * config.n_parallel
    return attention + state


def _kv_heads(info: ModelInfo, header: Header) -> tuple[int, ...]:
    """KV heads of each layer; 0 where a layer keeps a state, or borrows another layer's cache."""
    key = f"{info.architecture}."
    if info.is_recurrent:
        return (0,) * info.n_layer
    listed = header.integers(key + "attention.head_count_kv") or (info.n_head_kv,)
    heads = listed if len(listed) == info.n_layer else (max(listed),) * info.n_layer
    period = header.integer(key + "full_attention_interval")
    if period and info.is_hybrid:
        heads = tuple(n if (layer + 1) % period == 0 else 0 for layer, n in enumerate(heads))
    own = info.n_layer - header.integer(key + "attention.shared_kv_layers")
    return tuple(n if layer < own else 0 for layer, n in enumerate(heads))


def _layer_cells(info: ModelInfo, config: ModelConfig, header: Header, n_cells: int) -> Iterator[int]:
    """Cells of each layer: fewer where a sliding window is all that is kept, if the file says where."""
    pattern = header.values.get(f"{info.architecture}.attention.sliding_window_pattern")
    window = n_cells
    if not config.swa_full and info.n_swa:
        window = min(n_cells, _padded(info.n_swa * config.n_parallel + config.n_ubatch))
    for layer in range(info.n_layer):
        yield window if _slides(pattern, layer) else n_cells


def _slides(pattern: object, layer: int) -> bool:
    if isinstance(pattern, tuple):
        return layer < len(pattern) and bool(pattern[layer])
    return isinstance(pattern, int) and pattern > 1 and layer % pattern < pattern - 1


def _layer_bytes(info: ModelInfo, config: ModelConfig, header: Header, heads: int, cells: int) -> int:
    key = f"{info.architecture}.attention."
    width = info.n_embd // max(info.n_head, 1)
    k_width = header.integer(key + "key_length", width)
    # Latent attention (MLA) stores one vector for both.
    v_width = 0 if key + "key_length_mla" in header.values else header.integer(key + "value_length", width)
    return cells * (_row_bytes(heads * k_width, config.type_k) + _row_bytes(heads * v_width, config.type_v))


def _row_bytes(n: int, kind: str) -> int:
    size, elements = _BLOCKS[kind]
    return -(-n // elements) * size


def _state_bytes(info: ModelInfo, header: Header) -> int:
    """What one recurrent layer keeps of one sequence, always F32."""

    def of(name: str) -> int:
        return header.integer(f"{info.architecture}.{name}")

    convolution = max(of("ssm.conv_kernel") - 1, 0) * (
        of("ssm.inner_size") + 2 * of("ssm.group_count") * of("ssm.state_size")
    )
    scan = of("ssm.inner_size") * of("ssm.state_size")
    short = info.n_embd * max(of("shortconv.l_cache") - 1, 0)
    wkv = info.n_embd * (of("wkv.head_size") + of("token_shift_count"))
    delta = info.n_head * of("kda.head_dim") ** 2
    return _FLOAT * (convolution + scan + short + wkv + delta)


# --- compute buffers


def _compute_bytes(info: ModelInfo, config: ModelConfig, header: Header, n_cells: int) -> int:
    """An upper estimate of one graph's buffers: activations of a micro-batch, attention, logits."""
    rows = config.n_batch if info.is_embedding else min(config.n_ubatch, config.n_batch)
    width = header.integer(f"{info.architecture}.feed_forward_length", 4 * info.n_embd)
    activations = rows * (8 * info.n_embd + 3 * width)
    mask, scores = 2, info.n_head if config.flash_attn == "off" else 0
    attention = rows * max(n_cells, rows) * (mask + scores)
    logits = 0 if info.is_embedding else 2 * config.n_parallel * info.n_vocab
    return _FLOAT * (activations + attention + logits)


# --- what there is


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """RAM that this process may still take: the machine's, or less where a container's limit says so."""
    rooms = (limit - used for limit, used in _cgroup_limits(cgroup, membership))
    return max(0, min([int(psutil.virtual_memory().available), *rooms]))


def _installed_bytes() -> int:
    return int(psutil.virtual_memory().total)


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


# --- saying so


def refusal(info: ModelInfo, config: ModelConfig, memory: MemoryPlan, freed: int = 0) -> str:
    """The arithmetic of a plan that does not fit, and what to do."""
    weights = f"{shown_bytes(memory.weights)} weights + " if memory.weights_resident else ""
    mapped = "" if memory.weights_resident else f" (weights of {shown_bytes(memory.weights)} are mapped, not counted)"
    later = f" and {shown_bytes(freed)} that the present model gives back" if freed else ""
    return (
        f"{info.name} does not fit: {weights}{shown_bytes(memory.kv)} KV cache for {memory.n_cells} tokens "
        f"({config.type_k} K, {config.type_v} V) + {shown_bytes(memory.compute)} compute buffers "
        f"= {shown_bytes(memory.needed)} needed{mapped}, {shown_bytes(memory.available)} available{later}. "
        f"{_way_out(config, memory)}"
    )


def _way_out(config: ModelConfig, memory: MemoryPlan) -> str:
    ways = []
    if memory.kv:
        ways.append("a smaller n_ctx or n_kv_cells")
        if "q8_0" not in (config.type_k, config.type_v):
            ways.append("type_k='q8_0' with type_v='q8_0'")
    if memory.weights_resident:
        ways.append("load_mode='mmap'")
    return f"Try {', '.join([*ways, 'a smaller n_ubatch or a smaller model'])}"


def shown_bytes(n: int) -> str:
    """`n` bytes, short: 512 B, 3.4 MiB, 12.0 GiB."""
    value, units = float(n), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {units[-1]}"
