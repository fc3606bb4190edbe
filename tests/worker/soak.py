"""A worker under load from all sides while its model is changed again and again.

    python -m tests.worker.soak [--seconds 600] [--seed N]

Sixteen threads and four event loops generate, stream, cancel, drop, time out and embed; meanwhile the
model is reloaded a hundred times between three that differ in everything, and every tenth
reload fails on purpose. No request may be lost, answered twice or left hanging, and nothing may grow.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import itertools
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from llama_worker import LlamaWorker, ModelConfig, ModelLoadError, WorkerConfig
from tests import synth
from tests.worker.recording import Ledger, sums_of
from tests.worker.resources import Usage, slope, usage
from tests.worker.soak_clients import N_TASKS, PROMPTS, WHOLE, Journal, Question, Stage, TaskClient, ThreadClient

N_THREADS: Final = 16
N_LOOPS: Final = 4
N_RELOADS: Final = 100
SETTLED: Final = 20  # reloads after which nothing may grow
_WARM_UP: Final = 0.3  # the part of the time before the first reload
_PATIENCE: Final = 60.0  # seconds after the end of the load in which everybody must be answered
_OTHER_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}assistant:"
)


def models(folder: Path) -> list[ModelConfig]:
    """Other weights, vocabularies, templates, attention and limits."""
    plain = synth.llama(folder / "plain.gguf")
    small = synth.llama(folder / "small.gguf", n_vocab=400, weights="q8_0", seed=1, template=_OTHER_TEMPLATE)
    windowed = synth.swa(folder / "windowed.gguf")
    return [
        ModelConfig(model=str(plain), n_ctx=1024, n_threads=1),
        ModelConfig(model=str(small), n_ctx=512, n_kv_cells=2048, n_parallel=8, n_threads=1),
        ModelConfig(model=str(windowed), n_ctx=2048, n_parallel=3, n_threads=1, swa_full=False),
    ]


def broken_models(folder: Path, whole: Path) -> list[ModelConfig]:
    """Missing; cut off, which the header tells; and without a tensor, which only llama.cpp notices."""
    data = whole.read_bytes()
    (folder / "truncated.gguf").write_bytes(data[: len(data) // 2])
    (folder / "nameless.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight"))
    return [
        ModelConfig(model=str(folder / name), n_threads=1)
        for name in ("missing.gguf", "nameless.gguf", "truncated.gguf")
    ]


@dataclass(frozen=True, slots=True)
class Claim:
    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


class Soak:
    """One run. `faults` and `claims` say what came of it."""

    def __init__(self, folder: Path, *, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.journal = Journal()
        self.ledger = Ledger()
        self.samples: list[tuple[int, str, Usage]] = []
        self.n_failed = 0
        self._models = models(folder)
        self._broken = itertools.cycle(broken_models(folder, Path(self._models[0].model)))
        self._rng = random.Random(seed)
        self._stop = threading.Event()

    def run(self) -> None:
        self.before = usage()
        with LlamaWorker(self._models[0], WorkerConfig(queue_size=12)) as worker:
            threads = self._clients(worker)
            self.ledger.listen(worker)
            self._begun = worker.metrics()
            for thread in threads:
                thread.start()
            try:
                self._reload_all_the_time(worker)
            finally:
                self._stop.set()
            self._join(threads)
            self._check_idle(worker)
            self._counted = worker.metrics()
        self.after = usage()

    # -- the load -----------------------------------------------------------------------------------

    def _clients(self, worker: LlamaWorker) -> list[threading.Thread]:
        asked, widths = self._known(worker)
        stage = Stage(worker, self.journal, asked, widths, self._stop)
        seeds = iter(range(self._rng.randrange(10**6), 10**9))
        parts: list[Callable[[], None]] = [ThreadClient(stage, next(seeds)).run for _ in range(N_THREADS)]
        for _ in range(N_LOOPS):
            tasks = [TaskClient(stage, next(seeds)) for _ in range(N_TASKS)]
            parts.append(partial(_run_all, tasks))
        return [threading.Thread(target=part, name=f"client-{i}", daemon=True) for i, part in enumerate(parts)]

    def _known(self, worker: LlamaWorker) -> tuple[list[Question], frozenset[int]]:
        """The questions with their lengths in every model, and the widths of the models' vectors."""
        lengths, widths = [], set()
        for config in self._models:
            worker.reload(config)
            lengths.append([worker.generate(prompt, max_tokens=1).usage.prompt_tokens for prompt in PROMPTS])
            widths.add(worker.info.n_embd)
        of_each = zip(PROMPTS, zip(*lengths, strict=True), strict=True)
        return [Question(prompt, frozenset(counts)) for prompt, counts in of_each], frozenset(widths)

    def _reload_all_the_time(self, worker: LlamaWorker) -> None:
        good = itertools.cycle(self._models)
        # The heap grows until all kinds of requests have met: that is over before what is counted begins.
        self._stop.wait(_WARM_UP * self.seconds)
        started, every = time.monotonic(), (1 - _WARM_UP) * self.seconds / N_RELOADS
        for n in range(1, N_RELOADS + 1):
            self._reload(worker, None if n % 10 == 0 else next(good), overlap=n % 4 == 0)
            self.samples.append((n, worker.config.model, usage()))
            self._stop.wait(max(0.0, started + n * every - time.monotonic()))

    def _reload(self, worker: LlamaWorker, config: ModelConfig | None, *, overlap: bool) -> None:
        served = worker.config
        if config is not None:
            worker.reload(config, overlap=overlap)
            return
        try:
            worker.reload(next(self._broken), overlap=overlap)
            self.journal.faults.append("a broken model was loaded")
        except ModelLoadError:
            self.n_failed += 1
        if worker.config != served:
            self.journal.faults.append("a failed reload changed the model")

    # -- the end ------------------------------------------------------------------------------------

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        until = time.monotonic() + _PATIENCE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        hung = [thread.name for thread in threads if thread.is_alive()]
        if hung:
            faulthandler.dump_traceback()
            self.journal.faults.append(f"{len(hung)} clients hang: {', '.join(hung)}")

    def _check_idle(self, worker: LlamaWorker) -> None:
        """Whatever was dropped is gone too, and the cache's books are in order."""
        until = time.monotonic() + _PATIENCE
        while (busy := _busy(worker)) and time.monotonic() < until:
            threading.Event().wait(0.01)
        if busy:
            self.journal.faults.append(f"{busy} requests are still there when nobody asks any more")
        loaded = worker._service.loaded
        assert loaded is not None
        loaded.scheduler.cache.check()

    # -- the verdict --------------------------------------------------------------------------------

    @property
    def faults(self) -> list[str]:
        return self.journal.faults + [f"{claim.name}: {claim.value:g}" for claim in self.claims if not claim.holds]

    @property
    def claims(self) -> list[Claim]:
        return [
            Claim("requests lost", self.journal.lost, 0),
            Claim("faults", len(self.journal.faults), 0),
            Claim("MiB of memory more with each reload", self._slope(lambda sample: sample.rss), 0.1),
            Claim("threads more with each reload", self._slope(lambda sample: sample.threads), 0.05),
            Claim("files more with each reload", self._slope(lambda sample: sample.files), 0.05),
            Claim("requests accepted and not answered", self._counted.accepted - self._counted.answered, 0),
            Claim("embeddings counted otherwise than seen", abs(self._embeds - self.journal.seen("embedded")), 0),
            Claim("endings and tokens counted otherwise than recorded", self._miscounted, 0),
            Claim("whole answers seen and not counted", max(0, self._whole[0] - self._whole[1]), 0),
            Claim("whole answers counted and not seen", max(0, self._whole[1] - self._whole[0] - self._unseen), 0),
            Claim("tokens seen and not counted", max(0, self.journal.tokens - self._tokens), 0),
            Claim("files more after close", self.after.files - self.before.files, N_LOOPS),
        ]

    @property
    def _miscounted(self) -> int:
        """The metrics against the sums over every terminal event, to the token."""
        counted, begun = sums_of(self._counted), sums_of(self._begun)
        counted.subtract(begun)
        counted.subtract(self.ledger.sums)
        return sum(map(abs, counted.values()))

    @property
    def _embeds(self) -> int:
        return self._counted.embeds - self._begun.embeds

    @property
    def _tokens(self) -> int:
        return self._counted.completion_tokens - self._begun.completion_tokens

    @property
    def _whole(self) -> tuple[int, int]:
        """Answers that ended by themselves: as the clients saw them, and as the worker counted them."""
        counted, begun = self._counted.finished, self._begun.finished
        return self.journal.seen(*WHOLE), sum(counted.get(reason, 0) - begun.get(reason, 0) for reason in WHOLE)

    @property
    def _unseen(self) -> int:
        """Requests whose end nobody looked at; a few of them may have ended by themselves before."""
        return self.journal.seen("dropped") + self.journal.seen("cancelled") + self.journal.seen("DeadlineExceeded")

    def _slope(self, of: Callable[[Usage], float]) -> float:
        """Over samples of one model, for the models differ in size."""
        later = [sample for sample in self.samples if sample[0] > SETTLED]
        return slope([[(n, of(u)) for n, name, u in later if name == config.model] for config in self._models])

    def table(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        journal = self.journal
        yield f"{self.seconds:g} s, {N_RELOADS} reloads of which {self.n_failed} failed on purpose, as they should"
        yield f"{journal.ended.total()} requests, {journal.tokens} tokens, the longest took {journal.longest:.2f} s"
        for kind, n in sorted(journal.begun.items()):
            outcomes = Counter({outcome: m for (k, outcome), m in journal.ended.items() if k == kind})
            yield f"  {kind:15} {n:7}  {', '.join(f'{o} {m}' for o, m in outcomes.most_common())}"
        yield f"memory {self.samples[0][2].rss:.0f} MiB at first, {self.samples[-1][2].rss:.0f} at the end"
        for claim in self.claims:
            mark = "ok  " if claim.holds else "FAIL"
            yield f"  {mark} {claim.name}: {claim.value:.3g} (at most {claim.limit:g})"
        yield from (f"  {fault}" for fault in journal.faults[:20])


def _run_all(clients: Sequence[TaskClient]) -> None:
    """On an event loop of its own."""

    async def run() -> None:
        await asyncio.gather(*[client.run() for client in clients])

    asyncio.run(run())


def _busy(worker: LlamaWorker) -> int:
    status = worker.status()
    return status.running + status.waiting + status.queued + status.embedding


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.worker.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), seconds=arguments.seconds, seed=arguments.seed)
        soak.run()
    print(soak.table())
    return int(bool(soak.faults))


if __name__ == "__main__":
    sys.exit(main())
