"""Sample with random absurd parameters: python absurd_sampling.py MODEL SEED COUNT. Prints how many survived."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llama_worker import GenerationError, InvalidRequestError, ModelConfig, SamplingParams
from llama_worker._engine.base import DecodeStatus, Span
from llama_worker._engine.llama import load

NEVER = float("-inf")


def absurd(rng: random.Random, n_vocab: int) -> dict[str, Any]:
    """A random subset of the fields, with values from the edges of their ranges."""
    fields = makers(rng, n_vocab)
    return {name: fields[name]() for name in rng.sample(list(fields), rng.randint(1, len(fields)))}


def makers(rng: random.Random, n_vocab: int) -> Mapping[str, Callable[[], Any]]:
    def share() -> float:
        return rng.choice([0.0, 1.0, 1e-300, 1e-45, 1e-38, 0.5, 1 - 1e-9, rng.random()])

    def between(low: float, high: float) -> float:
        tiny = [min(high, max(low, value)) for value in (1e-300, 1e-40, 1e-7, 1.0)]
        return rng.choice([low, high, (low + high) / 2, rng.uniform(low, high), *tiny])

    def bias() -> dict[int, float]:
        return rng.choice(
            [
                {},
                {1: NEVER, 5: 100.0, 7: -1e308},
                dict.fromkeys(range(n_vocab - 1), NEVER),
                dict.fromkeys(range(n_vocab), NEVER),
                dict.fromkeys(range(300), 1e4),
                {3: 1e300},
            ]
        )

    breakers = [(), ("\n",), ("\0",), ("é中😀",), (" ",), ("x" * 40,), ("中" * 40,), tuple("abcdefgh")]
    return {
        "temperature": lambda: between(0, 100),
        "top_k": lambda: rng.choice([0, 1, 2, 129, n_vocab - 1, n_vocab, 2**24, rng.randrange(200)]),
        "top_p": share,
        "min_p": share,
        "typical_p": share,
        "top_n_sigma": lambda: between(-1, 1000),
        "xtc_probability": share,
        "xtc_threshold": share,
        "dynatemp_range": lambda: between(0, 100),
        "dynatemp_exponent": lambda: between(0, 100),
        "repeat_penalty": lambda: rng.choice([1e-300, 1e-40, 1e-10, 0.5, 1.0, 1.1, 100.0]),
        "repeat_last_n": lambda: rng.choice([-1, 0, 1, 64, 2**24]),
        "frequency_penalty": lambda: between(-100, 100),
        "presence_penalty": lambda: between(-100, 100),
        "dry_multiplier": lambda: between(0, 100),
        "dry_base": lambda: between(1, 100),
        "dry_allowed_length": lambda: rng.choice([0, 1, 2, 65536]),
        "dry_penalty_last_n": lambda: rng.choice([-1, 0, 1, 2, 64, 2**24]),
        "dry_sequence_breakers": lambda: rng.choice(breakers),
        "mirostat": lambda: rng.choice([0, 1, 2]),
        "mirostat_tau": lambda: between(0, 100),
        "mirostat_eta": share,
        "logit_bias": bias,
        "ignore_eos": lambda: rng.random() < 0.5,
        "seed": lambda: rng.randrange(2**32 - 1),
    }


def main(model: str, seed: int, count: int) -> int:
    rng = random.Random(seed)
    engine = load(ModelConfig(model=model, n_ctx=512, n_parallel=1, n_threads=1)).engine
    prompt = np.array([300, 301, 302] * 30, np.int32)
    assert engine.decode([Span(0, 0, prompt, True)]) is DecodeStatus.OK
    row = len(prompt) - 1
    before = engine.logits(row).copy()
    survived = 0
    for _ in range(count):
        try:
            sampler = engine.new_sampler(SamplingParams(**absurd(rng, engine.limits.n_vocab)), prompt)
            tokens = [engine.sample(row, sampler) for _ in range(3)]
            assert all(0 <= token < engine.limits.n_vocab for token in tokens)
            sampler.close()
        except (InvalidRequestError, GenerationError):
            pass  # refused, or nothing was left to choose: both are answers
        survived += 1
    assert np.array_equal(engine.logits(row), before), "sampling must leave the logits alone"
    engine.close()
    return survived


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
