"""LoraFile: a LoRA adapter as its GGUF file describes it, and whether it is one for a model.

llama.cpp aborts at keys of the wrong type, and when it computes with matrices that do not fit what they are
multiplied with; some of that it does not look at. So the whole file is checked here before it sees it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llama_worker._engine.base import LoraInfo
from llama_worker._engine.header import Header, read_header
from llama_worker._engine.layout import Layout, Tensor, read_layout
from llama_worker._errors import LoraLoadError, ModelLoadError

logger = logging.getLogger("llama_worker")

_FLOAT32: Final = 6
_STRING: Final = 8
_A, _B = b".lora_a", b".lora_b"
_TEXTS: Final = (b"general.type", b"general.architecture", b"adapter.type")
_ALPHA: Final = "adapter.lora.alpha"
_INVOCATION: Final = b"adapter.alora.invocation_tokens"
# F32, F16, Q8_0, BF16: what adapters are converted to. Not every other type can be multiplied with.
_TYPES: Final = (0, 1, 8, 30)
_NVFP4: Final = 40  # has scales of its own, beside which llama.cpp asserts that there is no adapter
_EMBEDDINGS: Final = b"token_embd.weight"
_OUTPUT: Final = b"output.weight"
# Of the model's tensors llama.cpp adds adapters to those only that it multiplies with: not to these, by their ends.
_UNMULTIPLIED: Final = (b"_norm.weight", b".bias", b"conv1d.weight", b".conv.weight", b".ssm_a", b".ssm_d")


@dataclass(frozen=True, slots=True)
class LoraFile:
    """`pairs`: for each matrix of the model that it changes, by name, the two that it is changed by."""

    info: LoraInfo
    architecture: str
    pairs: Mapping[bytes, tuple[Tensor, Tensor]]


class _Unfit(Exception):
    """Why it is no adapter, or not one for this model."""


def lora_header(path: str) -> Header:
    """What the header of the adapter at `path` says; milliseconds. Any thread. Raises LoraLoadError."""
    file = existing_lora(path)
    with _told_of(file):
        return read_header(file)


def existing_lora(path: str) -> Path:
    """The file that `path` names. Raises LoraLoadError."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise LoraLoadError(file.name, f"there is no such file in {file.parent}; check the path")
    return file


def read_lora(path: Path) -> LoraFile:
    """Read and check the adapter at `path`, whole: its digest takes a second for a gigabyte. Any thread.

    Read again only when it has changed. Raises LoraLoadError.
    """
    with _told_of(path):
        stat = path.stat()
        return _read_lora(path, stat.st_mtime_ns, stat.st_size)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file at `path` is a LoraLoadError that names it."""
    try:
        yield
    except LoraLoadError:
        raise
    except OSError as failed:
        raise LoraLoadError(path.name, f"it cannot be read: {failed.strerror or failed}") from None
    except (_Unfit, ModelLoadError) as wrong:
        raise LoraLoadError(path.name, str(wrong)) from None


@functools.lru_cache(maxsize=64)
def _read_lora(path: Path, _mtime: int, _size: int) -> LoraFile:
    header, layout = read_header(path), read_layout([path])
    pairs = _pairs(header, layout)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    info = LoraInfo(
        path=str(path),
        digest=digest,
        size=header.n_bytes,
        rank=max(b.shape[0] for _, b in pairs.values()),
        alpha=_alpha(header),
    )
    return LoraFile(info, header.text("general.architecture") or "", pairs)


def require_fit(lora: LoraFile, architecture: str, tensors: Mapping[bytes, Tensor]) -> None:
    """Raise LoraLoadError unless the adapter is for a model of `architecture` with these `tensors`."""
    with _told_of(Path(lora.info.path)):
        if lora.architecture != architecture:
            raise _Unfit(f"it is for {lora.architecture} models, this one is {architecture}")
        for name, (a, b) in lora.pairs.items():
            _check_pair(name, a, b, tensors)


def _pairs(header: Header, layout: Layout) -> dict[bytes, tuple[Tensor, Tensor]]:
    _check_keys(header, layout)
    halves: dict[bytes, dict[bytes, Tensor]] = {}
    norms = []
    for name, tensor in layout.tensors.items():
        half = name[-len(_A) :]
        if half in (_A, _B) and name.count(b".lora_") == 1:
            halves.setdefault(name[: -len(_A)], {})[half] = tensor
        elif name.endswith(b"_norm.weight"):
            norms.append(name)
        else:
            raise _Unfit(f"its tensor {_shown(name)} is neither a lora_a nor a lora_b")
    for name, parts in halves.items():
        if len(parts) < 2:
            raise _Unfit(f"of the pair for {_shown(name)} one is missing")
    if not halves:
        raise _Unfit("it changes no matrix")
    idle = [*norms, *(name for name in halves if name.endswith(_UNMULTIPLIED))]
    if all(name.endswith(_UNMULTIPLIED) for name in halves):
        raise _Unfit(f"it changes only what llama.cpp applies no adapter to, {_shown(idle[0])} among it")
    if idle:
        logger.warning("a LoRA adapter also changes %d norms or others that llama.cpp does not apply it to", len(idle))
    return {name: (parts[_A], parts[_B]) for name, parts in halves.items()}


def _check_keys(header: Header, layout: Layout) -> None:
    for name in (*layout.kinds, *layout.tensors):
        if b"\0" in name:  # C reads only what is before it, and might take it for another name
            raise _Unfit(f"a name in it, {_shown(name)}, is not one")
    for key in _TEXTS:
        if layout.kinds.get(key) != _STRING:
            raise _Unfit(f"it has no text {key.decode()}; it is no LoRA adapter")
    for kind, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if header.text(kind) != wanted:
            raise _Unfit(f"its {kind} is not {wanted!r}; it is no LoRA adapter")
    if layout.kinds.get(_ALPHA.encode(), _FLOAT32) != _FLOAT32 or not math.isfinite(_alpha(header)):
        raise _Unfit(f"its {_ALPHA} is no number")
    if _INVOCATION in layout.kinds:
        raise _Unfit("it is an activated LoRA (aLoRA), which is not supported; give an ordinary one")


def _alpha(header: Header) -> float:
    alpha = header.values.get(_ALPHA, 0.0)
    return alpha if isinstance(alpha, float) else math.nan


def _check_pair(name: bytes, a: Tensor, b: Tensor, tensors: Mapping[bytes, Tensor]) -> None:
    matrix = tensors.get(name)
    if matrix is None:
        raise _Unfit(f"it changes {_shown(name)}, which this model does not have; it was made for another one")
    if a.kind not in _TYPES or b.kind not in _TYPES:
        raise _Unfit(f"its matrices for {_shown(name)} are neither F32, F16, BF16 nor Q8_0; convert it again")
    if matrix.kind == _NVFP4:
        raise _Unfit(f"this model's {_shown(name)} is of type NVFP4, which takes no adapter")
    if name.endswith(_EMBEDDINGS) and (name != _EMBEDDINGS or _OUTPUT not in tensors):
        raise _Unfit(f"it changes {_shown(name)}, which in this model is no matrix of embeddings alone")
    if (a.shape, b.shape) != _wanted(name, matrix, b.shape[0]) or not b.shape[0]:
        raise _Unfit(
            f"its matrices for {_shown(name)}, {_sizes(a)} and {_sizes(b)}, do not fit the model's {_sizes(matrix)}; "
            "it was made for another one"
        )


def _wanted(name: bytes, matrix: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a and b. Embeddings are looked up: there a has a row for each token."""
    n_in, n_out, *others = matrix.shape
    if name == _EMBEDDINGS:
        return (rank, n_out, *others), (rank, n_in, *others)
    return (n_in, rank, *others), (rank, n_out, *others)


def _sizes(tensor: Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape[: 3 if tensor.shape[2] > 1 else 2])


def _shown(name: bytes) -> str:
    return repr(name[:80].decode("utf-8", "replace"))
