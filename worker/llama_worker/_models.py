"""Where a model comes from, and what its header says of it."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llama_worker import _demo_models
from llama_worker._config import as_model_config
from llama_worker._engine.base import ModelInfo
from llama_worker._engine.header import Header, read_header
from llama_worker._errors import ModelLoadError, ModelNotFoundError

_MIB: Final = 2**20
_MAX_LAYERS: Final = 512  # llama.cpp's own limit, which it asserts
_POOLING: Final = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
# They have no output head at all; some of their files do not say how they pool.
ENCODERS: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
# Key prefixes, after the architecture, that only models with a recurrent state have.
_STATE_KEYS: Final = ("ssm.", "wkv.", "shortconv.", "kda.", "token_shift_count")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A GGUF file as its header describes it. `headers` has one entry for each shard of a split model.

    `loras` are those of the adapters that are to be loaded with it, `draft` is its draft model.
    """

    info: ModelInfo
    headers: tuple[Header, ...]
    loras: tuple[Header, ...] = ()
    draft: ModelFile | None = None

    @property
    def header(self) -> Header:
        return self.headers[0]


def resolve(model: str) -> Path:
    """The GGUF file that `model` names: a path, or demo://NAME. May convert a demo model, once, which blocks
    for a second or two.

    Raises ModelNotFoundError, whose text says what to install or mend; ModelLoadError.
    """
    scheme, separator, name = model.partition("://")
    if not separator:
        return _existing_file(Path(model).expanduser().absolute())
    if scheme == "demo":
        return _demo_models.locate(name)
    if scheme == "hf":
        raise ModelNotFoundError(f"model={model!r}: hf:// is not offered yet; download the GGUF file and give its path")
    raise ModelNotFoundError(f"model={model!r}: unknown scheme {scheme!r}; give a path to a GGUF file, or demo://NAME")


def draft_path(model: str) -> Path:
    """As `resolve`, of a `draft_model`, which the errors name."""
    try:
        return resolve(model)
    except ModelLoadError as error:
        raise type(error)(f"draft_model={model!r}: {error}") from error


def inspect_model(model: str) -> ModelInfo:
    """What the header of `model` says, without loading it. Takes milliseconds; any thread.

    `model` is a path to a GGUF file, or demo://NAME. Raises ModelNotFoundError, ModelLoadError, and ConfigError for
    what names no model at all.
    """
    return read_info(resolve(as_model_config(model).model))


def read_info(path: Path) -> ModelInfo:
    """`inspect_model` for a file. Raises ModelNotFoundError and ModelLoadError."""
    return read_model(path).info


def read_model(path: Path) -> ModelFile:
    """The file at `path`, read again only when it has changed. Raises ModelNotFoundError, ModelLoadError."""
    stat = _existing_file(path).stat()
    try:
        return _read_model(path, stat.st_mtime_ns, stat.st_size)
    except OSError as failed:
        raise ModelLoadError(f"{path.name} cannot be read: {failed.strerror or failed}") from failed


def model_files(path: Path) -> tuple[Path, ...]:
    """All files of the model whose first one is `path`. Raises what `read_model` does."""
    return _shards(path, read_model(path).header)


def _existing_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelNotFoundError(f"{path.name} is a folder; give the path of a .gguf file in it")
    raise ModelNotFoundError(
        f"there is no file {path.name} in {path.parent}; check the path: a model is a .gguf file on this machine, "
        "and names of hubs are not looked up"
    )


@functools.lru_cache(maxsize=64)
def _read_model(path: Path, _mtime: int, _size: int) -> ModelFile:
    first = read_header(path)
    shards = _shards(path, first)
    headers = (first, *map(read_header, shards[1:]))
    return ModelFile(info=_info(path, shards, headers), headers=headers)


def _shards(path: Path, header: Header) -> tuple[Path, ...]:
    """All files of a split model, in order: llama.cpp opens the others by the name of the first."""
    count = header.integer("split.count", 1)
    if count <= 1:
        return (path,)
    name = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if name is None or int(name[2]) != count:
        raise ModelLoadError(
            f"{path.name} is one of {count} parts; give the path of the first, named …-00001-of-{count:05d}.gguf"
        )
    return tuple(_existing_file(path.with_name(f"{name[1]}-{i:05d}-of-{name[2]}.gguf")) for i in range(1, count + 1))


def _info(path: Path, shards: Sequence[Path], headers: Sequence[Header]) -> ModelInfo:
    header = headers[0]
    architecture = header.text("general.architecture")
    if not architecture:
        raise ModelLoadError(f"{path.name} does not name its architecture (general.architecture); it is no model file")
    if header.text("general.type") == "adapter":
        raise ModelLoadError(
            f"{path.name} is an adapter, no model; open the model that it is for, with it in lora_paths"
        )
    key = f"{architecture}.".__add__
    fault = _fault(header, key)
    if fault:
        raise ModelLoadError(f"{path.name} is damaged: {fault}. Fetch the file again")
    n_head = header.integer(key("attention.head_count"))
    has_state = any(name.startswith(key(state)) for name in header.values for state in _STATE_KEYS)
    pooling = header.values.get(key("pooling_type"))
    return ModelInfo(
        name=path.stem,
        path=str(path),
        architecture=architecture,
        size=sum(shard.stat().st_size for shard in shards),
        n_params=sum(part.n_params for part in headers),
        n_vocab=header.lengths.get("tokenizer.ggml.tokens", header.integer(key("vocab_size"))),
        n_ctx_train=header.integer(key("context_length")),
        n_embd=header.integer(key("embedding_length")),
        n_layer=header.integer(key("block_count")),
        n_head=n_head,
        n_head_kv=header.integer(key("attention.head_count_kv"), n_head),
        chat_template=header.text("tokenizer.chat_template"),
        pooling=_POOLING.get(pooling) if isinstance(pooling, int) else None,
        is_recurrent=has_state and n_head == 0,
        is_hybrid=has_state and n_head > 0,
        n_swa=header.integer(key("attention.sliding_window")),
        is_embedding=architecture in ENCODERS or bool(pooling),
        digest=_digest(shards, headers),
    )


def _fault(header: Header, key: Callable[[str], str]) -> str | None:
    """A value at which llama.cpp would end the process instead of refusing the file."""
    n_layer = header.integer(key("block_count"))
    if not 0 < n_layer <= _MAX_LAYERS:
        return f"it claims {n_layer} layers"
    for name in ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"):
        epsilon = header.values.get(key(name), 0.0)
        if not (isinstance(epsilon, float) and 0.0 <= epsilon < 1.0):
            return f"its {name} is {epsilon!r}"
    n_head, n_rotated = header.integer(key("attention.head_count")), header.integer(key("rope.dimension_count"), 2)
    width = header.integer(key("attention.key_length"), header.integer(key("embedding_length")) // max(n_head, 1))
    if n_head and (n_rotated % 2 or not 0 < n_rotated <= max(width, 2)):
        return f"it rotates {n_rotated} of {width} dimensions"
    return None


def _digest(shards: Sequence[Path], headers: Sequence[Header]) -> str:
    """Identifies the content without reading gigabytes: header, layout, size and samples of the weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path, header in zip(shards, headers, strict=True):
        with path.open("rb") as file:
            digest.update(file.read(header.start + _MIB))
            size = file.seek(0, 2)
            file.seek(max(0, size - _MIB))
            digest.update(file.read())
        digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()
