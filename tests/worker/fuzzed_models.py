"""Inspect and load damaged models; run as a program, because what it looks for would end the process.

    python fuzzed_models.py FIRST LAST FILE...

Says each seed before it begins, so whoever reads it knows at which one the process ended.
"""

from __future__ import annotations

import random
import signal
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import gguf

from llama_worker import LlamaWorker, LlamaWorkerError, ModelConfig, inspect_model

PATIENCE: Final = 60  # seconds for one model, after which it hangs
_EDGES: Final = (0, 1, 2, 3, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def places(file: Path) -> tuple[list[int], int]:
    """Where the numbers, types and names of keys and tensors lie, without the long lists; and where all ends."""
    reader = gguf.GGUFReader(file)
    infos: list[Any] = [tensor.field for tensor in reader.tensors]
    found: list[int] = list(range(4, 24))
    for field in [*reader.fields.values(), *infos]:
        length = min(sum(int(part.nbytes) for part in field.parts), 120)
        found += range(int(field.offset), int(field.offset) + length)
    return found, int(reader.data_offset)


def mutated(data: bytes, at_best: Sequence[int], end: int, rng: random.Random) -> bytes:
    """One to three damages to the header: a flipped bit, another number, a piece cut out, the end cut off."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.choice(at_best) if rng.random() < 0.8 else rng.randrange(4, end)
        at = min(at, len(damaged) - 8)
        match rng.randrange(6):
            case 0 | 1:
                damaged[at] ^= 1 << rng.randrange(8)
            case 2:
                damaged[at] = rng.randrange(256)
            case 3:
                struct.pack_into("<I", damaged, at, rng.choice(_EDGES) % 2**32)
            case 4:
                struct.pack_into("<Q", damaged, at, rng.choice(_EDGES))
            case _:
                del damaged[at : at + rng.randint(1, 8)]
    return bytes(damaged[: rng.randrange(24, len(damaged))]) if rng.random() < 0.05 else bytes(damaged)


def outcome(model: Path) -> str:
    """What became of it. Any error but ours is a failure."""
    try:
        info = inspect_model(str(model))
    except LlamaWorkerError as refused:
        return f"inspect: {type(refused).__name__}"
    try:
        with LlamaWorker(ModelConfig(model=str(model), n_ctx=256, n_batch=64, n_parallel=1, n_threads=1)) as worker:
            if info.is_embedding:
                worker.embed(["hello"])
            else:
                worker.generate("hello", max_tokens=2, temperature=0.0)
    except LlamaWorkerError as refused:
        return f"load: {type(refused).__name__}"
    return "served"


def main(first: int, last: int, files: Sequence[Path]) -> None:
    originals = [(file.read_bytes(), *places(file)) for file in files]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, last):
            rng = random.Random(seed)
            model = Path(folder, f"{seed}.gguf")
            model.write_bytes(mutated(*originals[seed % len(originals)], rng))
            print(seed, end=" ", flush=True)
            signal.alarm(PATIENCE)
            print(outcome(model), flush=True)
            model.unlink()
    signal.alarm(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
