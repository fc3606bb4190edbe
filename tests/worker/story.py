"""One story that makes use of every way to spare computing, told on one model after another.

Agents that share a system prompt start at once, more of them than slots, in fewer cells than they need; they come
back in turn, their replies reworded. After the first turn they find a new worker on the folder of the former one,
and before the last turn another that was given an export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_worker import WorkerClosed
from llama_worker._cache_transfer import CacheTransfer
from llama_worker._commands import Generate
from llama_worker._kv_ops import apply
from llama_worker._seq_ops import Restore, Share
from llama_worker._snapshots import cache_metrics_of, metrics_of
from llama_worker._tokens import TokenIds
from tests.worker.bench import Bench, ListSink
from tests.worker.scoring import Cold, Score, worst_of
from tests.worker.test_checkpoints import CHECKPOINTED, Run
from tests.worker.test_speculation_exact import Oracle

N_SAID = 12
CELLS = {"n_ctx": 1024, "n_kv_cells": 1280, "n_parallel": 3, "n_ubatch": 128}
"""200 tokens for all, and 100 to 340 of each agent's own: three in turn have to make room for each other."""


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """Which are on. Checkpoints are of no use to models that can be cut back, drafts to those that cannot."""

    sharing: bool = True
    checkpoints: bool = True
    ram: bool = True
    preemption: bool = True
    disk: bool = True
    export: bool = True
    loras: bool = True
    speculation: bool = True

    def __str__(self) -> str:
        on = [name for name in self.__slots__ if getattr(self, name)]
        off = [name for name in self.__slots__ if name not in on]
        if not on or not off:
            return "none" if off else "all"
        return "+".join(on) if len(on) <= len(off) else "all but " + "+".join(off)

    def matter_to(self, kind: str) -> bool:
        """Whether nothing is off that a model of this kind makes no use of anyway."""
        return all(getattr(self, name) for name in self.__slots__ if not is_of_use(name, kind))


def is_of_use(mechanism: str, kind: str) -> bool:
    """A model that cannot be cut back goes back to checkpoints, which is how it shares, and takes no drafts back."""
    if mechanism == "checkpoints":
        return kind in CHECKPOINTED
    return kind not in CHECKPOINTED or mechanism not in ("sharing", "speculation")


class Story:
    """The story on the engines that `load` opens. `used` counts what was made use of. Close it in the end.

    `spoil` is done to each engine. With `forgets`, a reply that was preempted goes on without its last token.
    """

    def __init__(
        self,
        load: Callable[..., Run],
        on: Mechanisms,
        folder: Path,
        adapter: Path,
        spoil: Callable[[Run], None] = lambda run: None,
        *,
        forgets: bool = False,
    ) -> None:
        self._load, self.on, self._folder, self._adapter = load, on, folder, adapter
        self._spoil, self._forgets = spoil, forgets
        self.used: Counter[str] = Counter()
        self.run = self._opened()

    def _opened(self) -> Run:
        on = self.on
        config: dict[str, Any] = {"speculation": "on" if on.speculation else "off"}
        if on.disk:
            config["cache_dir"] = str(self._folder / "disk")
        if on.loras:
            config["lora_paths"] = {"style": str(self._adapter)}
        run = self._load(**CELLS, **config)
        cache, scheduler = run.cache, run.bench.scheduler
        if not on.sharing:
            scheduler._limits = replace(scheduler._limits, can_share=False)
            cache.reach.can_share = False
        if not on.checkpoints:
            cache.checkpoints.budget = 0
        if not on.ram:
            cache.tier._budget = 0
        self._count(run)
        self._spoil(run)
        return run

    def _count(self, run: Run) -> None:
        lend = run.cache.lend

        def counted(*args: Any, **kwargs: Any) -> Any:
            loan = lend(*args, **kwargs)
            self.used["sharing"] += sum(
                isinstance(op, Share) or (isinstance(op, Restore) and op.donor is not None) for op in loan.ops
            )
            return loan

        run.cache.lend = counted  # type: ignore[method-assign]

    def close(self) -> None:
        """Let the engine go, and count what it made use of."""
        service = self.run.bench.service
        cache = cache_metrics_of(service)
        self.used["checkpoints"] += cache.checkpoint_hits
        self.used["ram"] += cache.saved_hits
        self.used["disk"] += cache.disk_hits
        self.used["speculation"] += metrics_of(service).accepted_drafts
        self.used["loras"] += sum(each.switches for each in service.loras.snapshot({}).values())
        self.run.bench.shut_down()

    def tell(self, cold: Cold, *, n_words: int = 100, late: int = 0, n_agents: int = 5, n_turns: int = 3) -> Score:
        """The worst score of all answers. What the agents say are ids, so each knows how its history is continued.

        The checkpoint that all could share is `late` tokens behind what they have in common.
        """
        rng = np.random.default_rng(4)

        def words(n: int) -> TokenIds:
            return rng.integers(300, 500, n).astype(np.int32)

        histories, scores = [words(2 * n_words)] * n_agents, list[Score]()
        for turn in range(n_turns):
            self._move(is_second=turn == 1, is_last=turn == n_turns - 1)
            prompts = [(np.append(history, words(n_words)), len(history)) for history in histories]
            marks = [(2 * n_words + late, n_known + late) for _, n_known in prompts]
            asked = [self._ask(i, prompts[i][0], marks[i]) for i in range(n_agents)]
            self._settle(asked, cold)
            answers = [self.run.probes[-1].answer(each.job.prompt) for each in asked]
            for each, answer in zip(asked, answers, strict=True):
                scores.append(cold.score(each.job.prompt, *answer, each.job.kv))
            # Every second reply comes back in another form.
            said = [np.append(words(2 * ((turn + i) % 2)), ids) for i, (ids, _) in enumerate(answers)]
            histories = [np.append(each.job.prompt, reply) for each, reply in zip(asked, said, strict=True)]
        return worst_of(scores)

    def _move(self, *, is_second: bool, is_last: bool) -> None:
        """To a new worker, which may know the folder of the former one, or be given an export."""
        if self.on.disk and is_second:
            self.close()
            self.run = self._opened()
        if self.on.export and is_last:
            finished(self.run.bench, CacheTransfer.export_cache, self._folder / "export")
            self.close()
            self.run = self._opened()
            self.used["export"] += finished(self.run.bench, CacheTransfer.import_cache, self._folder / "export")

    def _ask(self, agent: int, prompt: TokenIds, boundaries: tuple[int, ...]) -> Generate:
        """Where there are adapters every second agent speaks with one."""
        bench = self.run.bench
        loras = {"style": 0.5} if self.on.loras and agent % 2 else ()
        command = bench.request("one", max_tokens=N_SAID, temperature=0.0, ignore_eos=True, loras=loras)
        prompt = prompt.astype(np.int32)
        marks = tuple(sorted({*boundaries, len(prompt) - 1}))
        job = replace(command.job, prompt=prompt, boundaries=marks if self.run.cache.checkpoints.budget else ())
        command = replace(command, job=job)
        bench.put(command)
        return command

    def _settle(self, asked: Sequence[Generate], cold: Cold) -> None:
        """Once two are speaking the younger one loses its slot."""
        scheduler, preempted = self.run.bench.scheduler, not self.on.preemption
        drafts = scheduler.speculation is not None
        guesses = [(id(each), cold.reply(each.job.prompt, N_SAID, each.job.kv)) for each in asked if drafts]
        known = {command: (reply, seed) for seed, (command, reply) in enumerate(guesses)}
        while not all(isinstance(each.sink, ListSink) and each.sink.is_answered for each in asked):
            self.run.bench.step()
            for generation in [*scheduler.running, *scheduler.waiting] if drafts else ():
                if not isinstance(generation.drafter, Oracle):
                    reply, seed = known[id(generation.command)]
                    generation.drafter = Oracle(generation, reply, 0.3, seed)
            if not preempted and sum(g.is_decoding for g in scheduler.running) >= 2:
                preempted = True
                self._preempt()

    def _preempt(self) -> None:
        bench = self.run.bench
        apply(bench.service.loaded, bench.scheduler.preempt())  # type: ignore[arg-type]
        self.used["preemption"] += 1
        if self._forgets:
            tokens = bench.scheduler.waiting[0].tokens
            tokens.truncate(tokens.n - 1)


def finished(bench: Bench, call: Callable[..., Future[int]], folder: Path) -> int:
    """What an export or import comes to, which is the work of `bench` and of threads."""
    transfer = CacheTransfer(bench.channel, lambda: WorkerClosed("closed"))
    answer = call(transfer, bench.published.current, folder)
    answer.add_done_callback(lambda done: bench.channel.nudge())
    bench.settle(answer)
    return answer.result()
