"""Each way to spare computing, on and off, on each kind of memory: the answers are those of a fresh engine.

One story for all: agents that share a system prompt start at once, more of them than slots, in fewer cells than they
need; they come back in turn, their replies reworded. It makes use of every mechanism that is on, which is asserted.
The numeric tier: every token of every answer is compared with a cold pass. For the exact one see `test_exactness`.

Each comparison is shown able to fail: an error of one token in the mechanism is found by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from llama_worker._commands import Generate
from llama_worker._kv_ops import apply
from llama_worker._seq_ops import Restore, Share
from llama_worker._tokens import TokenIds
from tests.worker.bench import ListSink
from tests.worker.probe import Mistake
from tests.worker.scoring import Cold, Score, worst_of
from tests.worker.test_checkpoints import CHECKPOINTED, MODELS, Run

pytestmark = pytest.mark.engine

WORDS = ["river", "stone", "lamp", "count", "garden", "water", "light", "night", "hello", "world"]
ROUNDING, ERROR, REGRET = 0.035, 0.05, 0.05


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """Which are on. Checkpoints are of no use to models that can be cut back."""

    sharing: bool = True
    checkpoints: bool = True
    ram: bool = True
    preemption: bool = True

    def __str__(self) -> str:
        return "+".join(name for name in self.__slots__ if getattr(self, name)) or "none"


ALL, NONE = Mechanisms(), Mechanisms(False, False, False, False)
SINGLY = [replace(ALL, **{name: False}) for name in Mechanisms.__slots__]
COMBINATIONS = [ALL, *SINGLY, NONE]
"""Any two of them are, somewhere, both on, both off, and each on without the other."""
WITHOUT_CHECKPOINTS = [
    Mechanisms(sharing, False, ram, preemption)
    for sharing, ram, preemption in ((True, True, False), (True, False, True), (False, True, True), (False,) * 3)
]
"""The same of the other three, in the fewest."""


class Story:
    """The story on one engine. `used` counts what was made use of."""

    def __init__(self, run: Run, on: Mechanisms) -> None:
        self.run, self.on = run, on
        self.used = {"shared": 0, "restored": 0}
        self._switch()
        self._count()

    def _switch(self) -> None:
        cache, scheduler = self.run.cache, self.run.bench.scheduler
        if not self.on.sharing:
            scheduler._limits = replace(scheduler._limits, can_share=False)
            cache.reach.can_share = False
        if not self.on.checkpoints:
            cache.checkpoints.budget = 0
        if not self.on.ram:
            cache.tier._budget = 0

    def _count(self) -> None:
        lend = self.run.cache.lend

        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            loan = lend(*args, **kwargs)
            for op in loan.ops:
                branched = isinstance(op, Share) or (isinstance(op, Restore) and op.donor is not None)
                self.used["shared" if branched else "restored"] += branched or isinstance(op, Restore)
            return loan

        self.run.cache.lend = counted  # type: ignore[method-assign]

    def tell(self, cold: Cold, *, n_words: int = 100, late: int = 0, n_agents: int = 5, n_turns: int = 3) -> Score:
        """The worst score of all answers. What the agents say are ids, so each knows how its history is continued.

        The checkpoint that all could share is `late` tokens behind what they have in common.
        """
        rng = np.random.default_rng(4)

        def words(n: int) -> TokenIds:
            return rng.integers(300, 500, n).astype(np.int32)

        histories, scores = [words(2 * n_words)] * n_agents, []
        for turn in range(n_turns):
            prompts = [(np.append(history, words(n_words)), len(history)) for history in histories]
            asked = [self._ask(prompt, (2 * n_words + late, n_known + late)) for prompt, n_known in prompts]
            self._settle(asked)
            answers = [self.run.probes[-1].answer(each.job.prompt) for each in asked]
            scores += [cold.score(each.job.prompt, *answer) for each, answer in zip(asked, answers, strict=True)]
            # Every second reply comes back in another form.
            said = [np.append(words(2 * ((turn + i) % 2)), ids) for i, (ids, _) in enumerate(answers)]
            histories = [np.append(each.job.prompt, reply) for each, reply in zip(asked, said, strict=True)]
        return worst_of(scores)

    def _ask(self, prompt: TokenIds, boundaries: tuple[int, ...]) -> Generate:
        bench = self.run.bench
        command = bench.request("one", max_tokens=12, temperature=0.0, ignore_eos=True)
        prompt = prompt.astype(np.int32)
        marks = tuple(sorted({*boundaries, len(prompt) - 1}))
        job = replace(command.job, prompt=prompt, boundaries=marks if self.run.cache.checkpoints.budget else ())
        command = replace(command, job=job)
        bench.put(command)
        return command

    def _settle(self, asked: Sequence[Generate]) -> None:
        """Once two are speaking the younger one loses its slot."""
        bench, preempted = self.run.bench, not self.on.preemption
        while not all(isinstance(each.sink, ListSink) and each.sink.is_answered for each in asked):
            bench.step()
            if not preempted and sum(g.is_decoding for g in bench.scheduler.running) >= 2:
                preempted = True
                apply(bench.service.loaded, bench.scheduler.preempt())  # type: ignore[arg-type]


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Iterator[Callable[..., Score]]:
    """told(kind, on): the worst score of the story."""
    opened: list[Run | Cold] = []

    def tell(
        kind: str,
        on: Mechanisms,
        mistake: Mistake | None = None,
        spoil: Callable[[Run], None] | None = None,
        path: Path | None = None,
        **size: int,
    ) -> Score:
        fixture, settings = MODELS.get(kind, ("", {}))
        path = path or request.getfixturevalue(fixture)
        # 200 tokens for all, and 100 to 340 of each agent's own: three in turn have to make room for each other.
        cells = {"n_ctx": 1024, "n_kv_cells": 1280, "n_parallel": 3, "n_ubatch": 128}
        run = Run(path, mistake, **settings, **cells)
        cold = Cold(path, **settings)
        opened.extend([run, cold])
        story = Story(run, on)
        if spoil is not None:
            spoil(run)
        score = story.tell(cold, late=int(spoil is not None), **size)
        print(f"{kind}, {on}: {score}; {story.used}, {run.cache.tier.counts}")
        if mistake is None and spoil is None:
            check_used(story, kind, on)
        return score

    yield tell
    for each in opened:
        each.close() if isinstance(each, Cold) else each.bench.shut_down()


def check_used(story: Story, kind: str, on: Mechanisms) -> None:
    """What is on was made use of, and what is off was not."""
    cache = story.run.cache
    branches = on.checkpoints if kind in CHECKPOINTED else on.sharing
    assert bool(story.used["shared"]) is branches
    assert bool(cache.checkpoints.counts.hits) is (on.checkpoints and kind in CHECKPOINTED)
    assert bool(cache.tier.counts.hits) is on.ram


@pytest.mark.parametrize("on", COMBINATIONS, ids=str)
def test_answers_are_those_of_a_fresh_engine(kind: str, on: Mechanisms, told):
    score = told(kind, on)
    assert score.difference <= ROUNDING
    assert score.regret <= REGRET


def one_too_far(run: Run) -> None:
    """A cache that takes one token more for common than is."""
    reach = run.cache.reach
    usable, reachable = reach.usable, reach.reachable

    def wrong(slot, prompt):  # type: ignore[no-untyped-def]
        length = usable(slot, prompt)
        return min(length + 1, slot.n, len(prompt) - 1) if length and length < slot.n else length

    if reach.can_trim:
        reach.usable = wrong  # type: ignore[method-assign]
    else:
        reach.reachable = lambda slot, length: reachable(slot, length + 1)  # type: ignore[method-assign]


def test_one_token_too_many_taken_for_common_is_noticed(kind: str, told):
    assert told(kind, replace(ALL, ram=False), spoil=one_too_far).difference > ERROR


@pytest.mark.parametrize("mistake", ["shifted after restore", "shifted span", "other row"])
def test_an_error_of_one_token_is_noticed(kind: str, mistake: Mistake, told):
    assert told(kind, ALL, mistake).difference > ERROR


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("on", WITHOUT_CHECKPOINTS, ids=str)
def test_smollm2_answers_as_a_fresh_engine(smollm2_f32: Path, on: Mechanisms, told):
    """Its weights as F32; see `test_stress`. It can be cut back, so it makes no checkpoints."""
    score = told("smollm2", on, path=smollm2_f32, n_words=130, n_agents=4, n_turns=2)
    assert score.regret <= REGRET
