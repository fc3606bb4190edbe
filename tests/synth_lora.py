"""LoRA adapters with random matrices for the models of `synth`, and the same models with adapters merged into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import gguf
import numpy as np

Matrix: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Pair: TypeAlias = tuple[Matrix, Matrix]

MATRICES: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def lora(
    path: Path,
    model: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    alpha: float = 4.0,
    matrices: Iterable[str] = MATRICES,
    change: Callable[[dict[str, Pair]], object] | None = None,
    **keys: Any,
) -> Path:
    """An adapter for `model`: of each of its `matrices`, about half as large as they are.

    For tests of damaged files, `change` may do anything to the pairs, and `keys` replace its metadata (dots written
    as __, None leaves one out).
    """
    rng = np.random.default_rng(seed)
    reader = gguf.GGUFReader(model)
    pairs: dict[str, Pair] = {}
    for tensor in reader.tensors:
        if tensor.name.rpartition(".")[0].rpartition(".")[2] in matrices and tensor.name.endswith(".weight"):
            n_in, n_out = (int(n) for n in tensor.shape)
            a = rng.standard_normal((rank, n_in)) * n_in**-0.5
            b = rng.standard_normal((n_out, rank)) * 0.5 * rank**-0.5
            pairs[tensor.name] = a.astype(np.float32), b.astype(np.float32)
    if change is not None:
        change(pairs)
    architecture = str(reader.fields["general.architecture"].contents())
    _write(path, architecture, pairs, {"adapter__lora__alpha": np.float32(alpha), **keys})
    return path


def merged(model: Path, target: Path, *adapters: tuple[Path, float]) -> Path:
    """The F32 model with `adapters`, each times its scale, added to its weights by numpy."""
    deltas: dict[str, Matrix] = {}
    for path, scale in adapters:
        for name, delta in deltas_of(path, scale).items():
            deltas[name] = deltas[name] + delta if name in deltas else delta
    _copy(model, target, deltas)
    return target


def deltas_of(adapter: Path, scale: float) -> dict[str, Matrix]:
    """What each matrix is changed by."""
    reader = gguf.GGUFReader(adapter)
    tensors = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    deltas = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name.replace(".lora_a", ".lora_b")]
            factor = scale * alpha / b.shape[1] if alpha else scale
            deltas[name.removesuffix(".lora_a")] = (factor * (b @ a)).astype(np.float32)
    return deltas


def _write(path: Path, architecture: str, pairs: Mapping[str, Pair], keys: Mapping[str, Any]) -> None:
    said = {"general__type": "adapter", "adapter__type": "lora", **keys}
    writer = gguf.GGUFWriter(path, said.pop("general__architecture", architecture))
    for key, value in said.items():
        _add_key(writer, key.replace("__", "."), value)
    for name, (a, b) in pairs.items():
        for half, data in ((".lora_a", a), (".lora_b", b)):
            if data is not None:
                writer.add_tensor(name + half, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_key(writer: Any, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case str():
            writer.add_string(key, value)
        case np.float32():
            writer.add_float32(key, float(value))
        case float():
            writer.add_float64(key, value)
        case int():
            writer.add_uint32(key, value)
        case _:
            writer.add_array(key, value)


def _copy(source: Path, target: Path, deltas: Mapping[str, Matrix]) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], of_items)
    for tensor in reader.tensors:
        data = np.array(tensor.data, np.float32)
        writer.add_tensor(tensor.name, data + deltas[tensor.name] if tensor.name in deltas else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
