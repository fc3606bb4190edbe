"""Inspect damaged copies of a GGUF file; run as a program, because what it looks for would end the process.

python mutated_headers.py FILE COUNT SEED
"""

from __future__ import annotations

import random
import struct
import sys
from collections import Counter
from pathlib import Path

from llama_worker import ModelConfig, ModelLoadError
from llama_worker._engine.header import read_header
from llama_worker._memory import plan
from llama_worker._models import read_info

_EDGES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, end: int, rng: random.Random) -> bytes:
    """One to four damages before `end`: a flipped byte, an extreme number, a cut, a piece moved."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(4, min(end, len(damaged)) - 16)
        match rng.randrange(5):
            case 0:
                damaged[at] = rng.randrange(256)
            case 1:
                struct.pack_into("<Q", damaged, at, rng.choice(_EDGES))
            case 2:
                struct.pack_into("<I", damaged, at, rng.choice(_EDGES) % 2**32)
            case 3:
                del damaged[at : at + rng.randint(1, 16)]
            case _:
                struct.pack_into("<Q", damaged, rng.choice((8, 16)), rng.randrange(2 ** rng.randint(1, 64)))
    return bytes(damaged[: rng.randrange(24, len(damaged))]) if rng.random() < 0.1 else bytes(damaged)


def main(file: Path, count: int, seed: int) -> None:
    rng, data = random.Random(seed), file.read_bytes()
    end = read_header(file).start
    outcomes: Counter[str] = Counter()
    for index in range(count):
        damaged = file.with_name(f"{index}.gguf")
        damaged.write_bytes(mutated(data, end, rng))
        try:
            plan(read_info(damaged), ModelConfig(model=str(damaged), swa_full=False))
            outcomes["read"] += 1
        except ModelLoadError:
            outcomes["refused"] += 1
        damaged.unlink()
    print(dict(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
