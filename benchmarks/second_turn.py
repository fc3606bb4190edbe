"""The second turn of a session with a long history, against a prefill of nothing but its new tokens.

    python -m benchmarks.second_turn [--rounds N] [--history TOKENS] [--threads N]

For each kind of memory (synthesised models, large enough that computing takes longer than Python) the time from
asking to the first token, and beside it the time in which the bare engine, whose sequence holds the history
already, decodes the new tokens and samples one. The two take turns; ratios are medians over rounds. A turn is sent
as frameworks do: all messages again, the reply as text; once as it was, and once in another form, so that
everything after the question that it answers is new. New tokens are those that the two prompts do not have in
common: what a model that cannot cut its state back decodes besides counts against us.

The session is alone in the cache, and it is beside another of the same length, in both engines: attention steps over
the cells of others, which takes time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from benchmarks import workload
from benchmarks.flat import Found, report
from llama_worker import LlamaWorker, ModelConfig, SamplingParams
from llama_worker._engine.base import Engine, Span
from llama_worker._engine.llama import load
from llama_worker._prompts import generation_request
from llama_worker._tokens import TokenIds, common_prefix
from tests import synth

MOST: Final = 1.15
NEW_WORDS: Final = 60
GREEDY: Final = {"temperature": 0.0, "ignore_eos": True}
SIZE: Final = {"n_layer": 6, "width": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A model, and what is to be set for it."""

    name: str
    make: Callable[[Path], Path]
    settings: dict[str, Any]


KINDS: Final = (
    Kind(name="llama", make=lambda path: synth.llama(path, **SIZE), settings={}),
    Kind(name="window, all cells kept", make=lambda path: synth.swa(path, **SIZE), settings={}),
    Kind(name="window that drops cells", make=lambda path: synth.swa(path, **SIZE), settings={"swa_full": False}),
    Kind(name="recurrent", make=lambda path: synth.mamba(path, n_layer=6, width=4), settings={}),
    Kind(name="hybrid", make=lambda path: synth.lfm2(path, n_layer=6, width=4), settings={}),
)


class Bare:
    """The engine without a worker: a session in sequence 0, and the former one in the other sequence, if there is."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._former: TokenIds | None = None

    def hold(self, tokens: TokenIds) -> None:
        """Have `tokens` decoded, untimed."""
        for seq in range(self._engine.limits.n_seq):
            self._engine.seq_clear(seq)
        if self._former is not None and self._engine.limits.n_seq > 1:
            self._decode(self._former, 0, seq=1)
        self._decode(tokens, 0)
        self._former = tokens

    def seconds(self, tokens: TokenIds, start: int) -> float:
        """Decode `tokens` behind `start` others and sample one."""
        sampler = self._engine.new_sampler(SamplingParams(**GREEDY), tokens)
        begun = time.perf_counter()
        row = self._decode(tokens, start, says=True)
        self._engine.sample(row, sampler)
        took = time.perf_counter() - begun
        sampler.close()
        return took

    def _decode(self, tokens: TokenIds, start: int, *, seq: int = 0, says: bool = False) -> int:
        rows = self._engine.limits.n_ubatch
        for at in range(0, len(tokens), rows):
            part = tokens[at : at + rows]
            last = at + rows >= len(tokens)
            self._engine.decode([Span(seq, start + at, part, says and last)])
        return len(part) - 1


def measure(kind: Kind, path: Path, n_sessions: int, *, n_rounds: int, n_history: int, threads: int) -> list[Found]:
    sizes = {"n_ctx": 8192, "n_kv_cells": 8192 * n_sessions, "n_parallel": n_sessions}
    config = ModelConfig(model=str(path), n_threads=threads, **sizes, **kind.settings)
    bare = Bare(load(config).engine)
    ratios: dict[str, list[float]] = {"as it was": [], "in another form": []}
    decoded = []
    with LlamaWorker(config) as worker:
        for number in range(n_rounds + 1):
            for i, form in enumerate(ratios):
                ours, bound, n_new = _round(worker, bare, n_history, seed=2 * number + i, form=form)
                if number:  # the first warms up
                    ratios[form].append(ours / bound)
                    decoded.append(n_new)
    text = f"{kind.name}, {'alone' if n_sessions == 1 else 'beside another'}: reply sent back "
    new = f" ({median(decoded):.0f} new tokens)"
    return [Found(text=text + form + new, value=median(of), at_most=MOST, unit="×") for form, of in ratios.items()]


def _round(worker: LlamaWorker, bare: Bare, n_history: int, *, seed: int, form: str) -> tuple[float, float, int]:
    """Seconds to the first token of a second turn, ours and the engine's alone, and the tokens that are new in it."""
    first = _first_turn(worker, n_history, seed)
    reply = worker.generate(first, max_tokens=8, logprobs=0, **GREEDY)
    known = np.append(_tokens(worker, first), [sampled.token for sampled in reply.logprobs[:-1]])
    said = reply.text if form == "as it was" else f"(reworded) {reply.text}"
    question = workload.story(NEW_WORDS, seed=9000 + seed)
    second = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": question}]
    tokens = _tokens(worker, second)
    common = common_prefix(known, tokens)
    bare.hold(tokens[:common])

    def ours() -> float:
        begun = time.perf_counter()
        worker.generate(second, max_tokens=1, **GREEDY)
        return time.perf_counter() - begun

    def bound() -> float:
        return bare.seconds(tokens[common:], common)

    order = [ours, bound] if seed % 4 < 2 else [bound, ours]
    took = {job: job() for job in order}
    return took[ours], took[bound], len(tokens) - common


def _tokens(worker: LlamaWorker, messages: list[Any]) -> TokenIds:
    """As the worker decodes them: a reply of its own has the ids that were sampled."""
    return worker._view().prepare_generation(generation_request(messages, None, {"max_tokens": 1})).prompt


def _first_turn(worker: LlamaWorker, n_history: int, seed: int) -> list[Any]:
    """A system message and a question, of about `n_history` tokens."""
    system = {"role": "system", "content": f"session {seed}: " + workload.story(20, seed=seed)}
    n_words = n_history
    while True:
        messages = [system, {"role": "user", "content": workload.story(n_words, seed=5000 + seed)}]
        n_tokens = worker.count_tokens(messages)
        if n_tokens <= 1.02 * n_history or not n_words:
            return messages
        n_words = int(n_words * n_history / n_tokens)


def main() -> int:
    """1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_turn", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--history", type=int, default=4000, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help=f"one of: {', '.join(kind.name for kind in KINDS)}")
    given = parser.parse_args()
    status = 0
    with TemporaryDirectory() as folder:
        for number, kind in enumerate(kind for kind in KINDS if given.only in kind.name):
            path = kind.make(Path(folder) / f"{number}.gguf")
            for n_sessions in (1, 2):
                sizes = {"n_rounds": given.rounds, "n_history": given.history, "threads": given.threads}
                status |= report(measure(kind, path, n_sessions, **sizes))
    return status


if __name__ == "__main__":
    sys.exit(main())
