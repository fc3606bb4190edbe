"""Load damaged LoRA adapters and generate with them; run as a program, because what it looks for would end the process.

    python fuzzed_loras.py FIRST LAST MODEL ADAPTER

Every other one is the ADAPTER with damaged bytes, the rest are well-formed files of absurd content. Says each seed
before it begins, so whoever reads it knows at which one the process ended.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from llama_worker import GenerationError, LlamaWorker, LoraLoadError, ModelConfig
from tests.synth_lora import lora
from tests.worker.fuzzed_models import PATIENCE, mutated, places

_SIZES = (1, 2, 3, 4, 32, 64, 128, 256, 512)


def absurd(path: Path, model: Path, rng: random.Random) -> None:
    """A file that libggml takes: with other matrices, shapes, types or numbers in some places."""

    def change(pairs: dict[str, Any]) -> None:
        for name in rng.sample(sorted(pairs), rng.randint(0, 2)):
            a, b = pairs[name]
            match rng.randrange(8):
                case 0:
                    pairs[name] = _random(rng, a.ndim), b
                case 1:
                    pairs[name] = a, _random(rng, b.ndim)
                case 2:
                    pairs[name] = _random(rng, rng.randint(1, 4)), _random(rng, rng.randint(1, 4))
                case 3:
                    kind = rng.choice((np.float16, np.float64, np.int8, np.int16, np.int32, np.int64))
                    pairs[name] = a.astype(kind), b.astype(kind if rng.random() < 0.5 else np.float32)
                case 4:
                    pairs[name] = a * np.float32(rng.choice((np.nan, np.inf, 1e30))), b
                case 5:
                    other = rng.choice((*sorted(pairs), "token_embd.weight", "output.weight", "output_norm.weight"))
                    pairs[other] = pairs.pop(name)
                case 6:
                    pairs["token_embd.weight"] = _ones(rng.choice((4, 128)), 512), _ones(128, rng.choice((4, 128)))
                    pairs["token_embd.weight"] = tuple(half.T.copy() for half in pairs["token_embd.weight"])
                case _:
                    pairs[name] = np.stack([a] * 2), np.stack([b] * rng.randint(1, 2))

    alpha = rng.choice((0.0, 4.0, -3.0, 1e30, float("inf"), 1e-30))
    lora(path, model, seed=rng.randrange(9), rank=rng.choice((1, 3, 4, 200)), alpha=alpha, change=change)


def _ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def _random(rng: random.Random, n_dims: int) -> Any:
    return _ones(*(rng.choice(_SIZES[: None if axis < 2 else 3]) for axis in range(n_dims)))


def outcome(worker: LlamaWorker, adapter: Path) -> str:
    """What became of it. Any error but ours is a failure."""
    try:
        worker.add_lora("damaged", adapter)
    except LoraLoadError:
        return "refused"
    try:
        worker.generate("hello", max_tokens=2, temperature=0.0, loras={"damaged": 0.5})
    except GenerationError:
        pass  # its numbers are none
    finally:
        worker.remove_lora("damaged")
    worker.generate("hello", max_tokens=2, temperature=0.0)
    return "served"


def main(first: int, last: int, model: Path, whole: Path) -> None:
    data, (at_best, end) = whole.read_bytes(), places(whole)
    config = ModelConfig(model=str(model), n_ctx=256, n_batch=64, n_parallel=1, n_threads=1)
    with tempfile.TemporaryDirectory() as folder, LlamaWorker(config) as worker:
        for seed in range(first, last):
            adapter = Path(folder, f"{seed}.gguf")
            print(seed, end=" ", flush=True)
            signal.alarm(PATIENCE)
            if seed % 2:
                adapter.write_bytes(mutated(data, at_best, end, random.Random(seed)))
            else:
                absurd(adapter, model, random.Random(seed))
            print(outcome(worker, adapter), flush=True)
            adapter.unlink()
    signal.alarm(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
