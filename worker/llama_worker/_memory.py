"""What a model would take of this machine's memory, from its header alone, before anything is allocated.

    weights      the bytes of all tensors; exact
    KV cache     cells x layers x heads, and the states of recurrent layers; exact
    compute      one graph's buffers, the rows of logits, the vocabulary's tables; estimated on the high side
    adapters     the bytes of all tensors of the LoRA adapters that are loaded with it; exact
    draft        KV cache and buffers of the draft model; its weights are among the weights
    embedding    KV cache, buffers and output rows of the context that embeds texts, made at its first use
    saved        states that are kept in RAM, as they come: `cache_ram` at most

Weights that are mapped from the file are lent by the page cache, which gives them back under pressure: they
are shown, but need not fit into RAM. With load_mode "none", "mlock" or "direct_io" they must. Layers that are
offloaded take their device's memory instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from llama_worker._config import ModelConfig, as_model_config
from llama_worker._engine.base import ModelInfo, outputs_of, sequences_of
from llama_worker._engine.embedding import can_embed, embedding_limits
from llama_worker._engine.header import Header
from llama_worker._engine.lora_file import lora_header
from llama_worker._free_memory import FreeMemory, free_memory
from llama_worker._models import ENCODERS, ModelFile, draft_path, read_model, resolve

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
_HALF: Final = 2
CELL_STEP: Final = 256
"""llama.cpp pads the KV cache to so many cells."""
# What a token takes in the tables of the vocabulary, the model's own and ours together.
_TOKEN_ENTRY: Final = 512
_MAPPED_MODES: Final = frozenset({"auto", "mmap"})
_OUTPUT: Final = "output.weight"
_EMBEDDING: Final = "token_embd.weight"
_LAYER: Final = re.compile(r"blk\.(\d+)\.")
# Tensors that llama.cpp keeps in RAM: rows are looked up in them.
_INPUTS: Final = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a model would take and what there is, in bytes, and whether that fits.

    `kv` is for `n_cells` tokens and includes the states of recurrent layers. `embedding` is taken when the
    first text is embedded; it must be free beforehand only for a model that does nothing else. `saved` is taken as
    states are saved, up to `cache_ram`; it need not be free beforehand either, but the verdict says when it is not.
    `free_ram` respects the limits of control groups. `free_device` is None where no layer is offloaded.
    `needed_ram` and `needed_device` are what must be free before the model is opened; mapped weights are
    not part of it (`weights_resident` is False). `verdict` says it in words, with the way out.
    """

    weights: int
    kv: int
    compute: int
    loras: int = 0
    draft: int = 0
    embedding: int
    saved: int = 0
    free_ram: int
    free_device: int | None
    needed_ram: int
    needed_device: int
    n_cells: int
    weights_resident: bool
    verdict: str

    @property
    def fits(self) -> bool:
        return self.needed_ram <= self.free_ram and self.needed_device <= (self.free_device or 0)

    @property
    def lacks_room_to_save(self) -> bool:
        """Whether states would be saved until more memory is taken than there is."""
        return self.saved > self.free_ram - self.needed_ram

    @property
    def total(self) -> int:
        """What the model takes when everything of it is in use."""
        return self.weights + self.kv + self.compute + self.loras + self.draft + self.embedding + self.saved


def plan_memory(model: str | ModelConfig) -> MemoryPlan:
    """What `model` would take of this machine, and whether it fits. Loads nothing; milliseconds; any thread.

    A name stands for its default ModelConfig. Raises ModelNotFoundError, ModelLoadError and LoraLoadError.
    """
    config = as_model_config(model)
    return planned(described(resolve(config.model), config), config, free_memory())


def plan(info: ModelInfo, config: ModelConfig) -> MemoryPlan:
    """`plan_memory` for the model that `info` describes. Raises what `described` raises."""
    return planned(described(Path(info.path), config), config, free_memory())


def described(path: Path, config: ModelConfig) -> ModelFile:
    """The model at `path` with the adapters and the draft model of `config`.

    Raises what `read_model` raises, and LoraLoadError.
    """
    paths = dict.fromkeys(path for _, path in config.lora_paths)  # two names of one file share what is loaded
    draft = None if config.draft_model is None else read_model(draft_path(config.draft_model))
    return replace(read_model(path), loras=tuple(map(lora_header, paths)), draft=draft)


def planned(file: ModelFile, config: ModelConfig, free: FreeMemory) -> MemoryPlan:
    """What `config` takes of the model in `file`, held against what is free. Pure."""
    parts = _Parts.of(file, config)
    n_devices, free_device = free.spread(config)
    n_offloaded = offloaded_layers(file.info, config) if n_devices else 0
    needed_ram, needed_device = parts.placed(config, n_offloaded, n_devices)
    draft = None if file.draft is None else _planned_draft(file.draft, file.info, config, free)
    if draft is not None:
        needed_ram, needed_device = needed_ram + draft.needed_ram, needed_device + draft.needed_device
    memory = MemoryPlan(
        weights=parts.weights + (0 if draft is None else draft.weights),
        kv=sum(parts.kv_layers),
        compute=parts.compute,
        loras=parts.loras,
        draft=0 if draft is None else draft.kv + draft.compute,
        embedding=parts.embedding,
        saved=config.cache_ram << 20 if parts.kv_layers else 0,
        free_ram=free.ram,
        free_device=free_device if n_offloaded else None,
        needed_ram=needed_ram,
        needed_device=needed_device,
        n_cells=parts.n_cells,
        weights_resident=_is_resident(config),
        verdict="",
    )
    return replace(memory, verdict=_verdict(memory, config))


def _planned_draft(draft: ModelFile, info: ModelInfo, config: ModelConfig, free: FreeMemory) -> MemoryPlan | None:
    own = config.of_draft(info.n_ctx_train)
    return None if own is None else planned(draft, own, free)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What there is to place.

    `weight_layers`: bytes of each layer's tensors, the output last; `tied`: of its copy of the embedding, if it
    has none of its own. `lora_layers`: what adapters add to them. `kv_layers`: bytes of each layer; empty for a model
    that only embeds.
    """

    weights: int
    weight_layers: tuple[int, ...]
    loras: int
    lora_layers: tuple[int, ...]
    tied: int
    kv_layers: tuple[int, ...]
    compute: int
    embedding: int
    n_cells: int

    @classmethod
    def of(cls, file: ModelFile, config: ModelConfig) -> _Parts:
        info, header = file.info, file.header
        tensors = {name: size for part in file.headers for name, size in part.tensors.items()}
        n_cells = padded(cells_asked(info, config))
        return cls(
            weights=sum(part.n_bytes for part in file.headers),
            weight_layers=_weight_layers(info, tensors),
            loras=sum(lora.n_bytes for lora in file.loras),
            lora_layers=_lora_layers(info, file.loras),
            tied=0 if _OUTPUT in tensors or info.architecture in ENCODERS else tensors.get(_EMBEDDING, 0),
            kv_layers=() if info.is_embedding else tuple(_layer_sizes(info, config, header, n_cells)),
            compute=_TOKEN_ENTRY * info.n_vocab
            + (0 if info.is_embedding else _compute_bytes(info, config, header, n_cells)),
            embedding=_embedding_bytes(info, config, header),
            n_cells=n_cells,
        )

    @property
    def buffers(self) -> int:
        """What must be there besides weights and KV cache; a model that only embeds has but one context."""
        return self.compute + (0 if self.kv_layers else self.embedding)

    def placed(self, config: ModelConfig, n_offloaded: int, n_devices: int) -> tuple[int, int]:
        """What must be free in RAM and on devices. Both sides may need the buffers, and each device its own."""
        first = len(self.weight_layers) - n_offloaded  # the output goes first, then the last layer, and so on
        weights_off = sum(self.weight_layers[first:])
        kv_off = sum(self.kv_layers[first:]) if config.offload_kqv else 0
        loras_off = sum(self.lora_layers[first:])
        weights = self.weights - weights_off if _is_resident(config) else 0
        ram = weights + self.loras - loras_off + sum(self.kv_layers) - kv_off + self.buffers
        return ram, weights_off + self.tied + loras_off + kv_off + n_devices * self.buffers if n_offloaded else 0


def _weight_layers(info: ModelInfo, tensors: Mapping[str, int]) -> tuple[int, ...]:
    layers = [0] * (info.n_layer + 1)
    for name, size in tensors.items():
        layer = _LAYER.match(name)
        if layer is not None or not name.startswith(_INPUTS):
            layers[min(int(layer[1]), info.n_layer) if layer else -1] += size
    return tuple(layers)


def _lora_layers(info: ModelInfo, loras: tuple[Header, ...]) -> tuple[int, ...]:
    """Bytes that adapters add to each layer: they lie where the matrices lie that they change."""
    layers = (_weight_layers(info, lora.tensors) for lora in loras)
    return tuple(map(sum, zip((0,) * (info.n_layer + 1), *layers, strict=True)))


def _is_resident(config: ModelConfig) -> bool:
    return config.load_mode not in _MAPPED_MODES


def offloaded_layers(info: ModelInfo, config: ModelConfig) -> int:
    """How many layers `config` wants on devices, the output layer counted as one."""
    layers = info.n_layer + 1
    return layers if config.n_gpu_layers < 0 else min(layers, config.n_gpu_layers)


# --- KV cache and recurrent states


def cells_asked(info: ModelInfo, config: ModelConfig) -> int:
    """How many tokens the KV cache shall hold; 0 for a model that only embeds."""
    return 0 if info.is_embedding else config.n_kv_cells or config.n_ctx or info.n_ctx_train


def padded(cells: int) -> int:
    return -(-cells // CELL_STEP) * CELL_STEP


def _layer_sizes(info: ModelInfo, config: ModelConfig, header: Header, n_cells: int) -> Iterator[int]:
    """Bytes that each layer keeps: of attention, or the states of all sequences."""
    kv_heads = _kv_heads(info, header)
    # A layer without heads of its own keeps a state or, in a model without states, borrows another layer's cache.
    state = _state_bytes(info, header) * config.n_parallel
    for heads, cells in zip(kv_heads, _layer_cells(info, config, header, n_cells), strict=True):
        yield _layer_bytes(info, config, header, heads, cells) if heads else state


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
        window = min(n_cells, padded(info.n_swa * config.n_parallel + config.n_ubatch))
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


# --- buffers


def _compute_bytes(info: ModelInfo, config: ModelConfig, header: Header, n_cells: int) -> int:
    """The graph of a micro-batch, and the rows of logits of a decode, in the graph and copied out of it."""
    rows = min(config.n_ubatch, config.n_batch)
    is_stateful = info.is_recurrent or info.is_hybrid
    outputs = max(outputs_of(config), sequences_of(config, window=info.n_swa, is_stateful=is_stateful))
    return _graph_bytes(info, config, header, rows, n_cells) + 2 * _FLOAT * outputs * info.n_vocab


def _graph_bytes(info: ModelInfo, config: ModelConfig, header: Header, rows: int, cells: int) -> int:
    """Activations, attention masks and, without flash attention, scores: as many as live at once."""

    def of(name: str) -> int:
        return header.integer(f"{info.architecture}.{name}")

    wide = max(of("feed_forward_length"), of("expert_feed_forward_length") * of("expert_used_count"))
    activations = _FLOAT * rows * (8 * info.n_embd + 3 * (wide or 4 * info.n_embd) + 6 * of("ssm.inner_size"))
    n_masks = (2 if info.n_swa else 1) if any(_kv_heads(info, header)) else 0
    # A cache of low precision, and "auto" wherever the device can, means flash attention: masks of F16, no scores.
    seen = _FLOAT * (n_masks + info.n_head) if config.flash_attn == "off" else _HALF * n_masks
    return activations + rows * max(cells, rows) * seen


def _embedding_bytes(info: ModelInfo, config: ModelConfig, header: Header) -> int:
    """A context for one batch, with its logits, and an output row of logits and states for every token of it."""
    if not can_embed(config, info):
        return 0
    n_tokens, _, n_seq = embedding_limits(config, info)
    rows = -(-n_tokens // n_seq) * n_seq
    own = config.model_copy(
        update={"n_parallel": n_seq, "type_k": "f16", "type_v": "f16", "swa_full": True, "flash_attn": "auto"}
    )
    output = _FLOAT * rows * (info.n_vocab + info.n_embd)
    graph = _graph_bytes(info, own, header, rows, rows)
    if info.architecture in ENCODERS:  # no KV cache, no output head
        return output + graph
    return output + graph + _FLOAT * rows * info.n_vocab + sum(_layer_sizes(info, own, header, padded(rows)))


# --- saying so


def _verdict(memory: MemoryPlan, config: ModelConfig) -> str:
    if not memory.fits:
        return f"does not fit: {_shortage(memory, config)}. Try {', '.join(_ways_out(memory, config))}"
    device = ""
    if memory.free_device is not None:
        device = f", {shown_bytes(memory.needed_device)} of {shown_bytes(memory.free_device)} on devices"
    fits = f"fits: needs {shown_bytes(memory.needed_ram)} of {shown_bytes(memory.free_ram)} free RAM{device}"
    return "; ".join([fits, *_later(memory)])


def _later(memory: MemoryPlan) -> Iterator[str]:
    """What may be taken later, and is not there."""
    left = memory.free_ram - memory.needed_ram
    if memory.n_cells and memory.embedding > left:
        yield f"embedding texts would take {shown_bytes(memory.embedding)} more, which is not there"
    if memory.lacks_room_to_save:
        yield f"saved states may come to {shown_bytes(memory.saved)}, {shown_bytes(left)} are left; lower cache_ram"


def _shortage(memory: MemoryPlan, config: ModelConfig) -> str:
    """The arithmetic of what is short: RAM, or the devices."""
    if memory.needed_ram <= memory.free_ram:
        return (
            f"{shown_bytes(memory.needed_device)} of weights, KV cache and buffers needed on devices, "
            f"{shown_bytes(memory.free_device or 0)} free there"
        )
    parts = [f"{shown_bytes(memory.weights)} weights"] if memory.weights_resident else []
    if memory.n_cells:
        parts.append(
            f"{shown_bytes(memory.kv)} KV cache for {memory.n_cells} tokens ({config.type_k} K, {config.type_v} V)"
        )
    parts.append(f"{shown_bytes(memory.compute)} compute buffers")
    if memory.loras:
        parts.append(f"{shown_bytes(memory.loras)} LoRA adapters")
    if memory.draft:
        parts.append(f"{shown_bytes(memory.draft)} draft model")
    if not memory.n_cells:
        parts.append(f"{shown_bytes(memory.embedding)} to embed a batch")
    mapped = "" if memory.weights_resident else f" (weights of {shown_bytes(memory.weights)} are mapped, not counted)"
    off = ", less what goes to devices" if memory.free_device is not None else ""
    needed = f"{shown_bytes(memory.needed_ram)} needed{mapped}"
    return f"{' + '.join(parts)}{off} = {needed}, {shown_bytes(memory.free_ram)} free"


def _ways_out(memory: MemoryPlan, config: ModelConfig) -> list[str]:
    ways = []
    if memory.n_cells and memory.kv:
        ways.append("a smaller n_ctx or n_kv_cells, or fit='auto'" if config.fit == "refuse" else "a smaller n_ctx_min")
        if "q8_0" not in (config.type_k, config.type_v):
            ways.append("type_k='q8_0' with type_v='q8_0'")
    if memory.loras:
        ways.append("fewer lora_paths")
    if memory.draft:
        ways.append("no draft_model")
    if memory.needed_ram <= memory.free_ram:
        ways.append("a smaller n_gpu_layers")
    elif memory.weights_resident:
        ways.append("load_mode='mmap'")
    return [*ways, "a smaller n_ubatch or a smaller model" if memory.n_cells else "a smaller n_batch or model"]


def shown_bytes(n: int) -> str:
    """`n` bytes, short: 512 B, 3.4 MiB, 12.0 GiB."""
    value, units = float(n), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {units[-1]}"
