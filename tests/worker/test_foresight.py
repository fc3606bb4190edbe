"""How many cells running replies will need: as counting step by step says, and never a reason to wait for ever."""

import random

import pytest

from llama_worker import Finished
from llama_worker._foresight import LEAST, ReplyLengths, most_cells
from tests.worker.bench import Bench


@pytest.mark.parametrize("seed", range(50))
def test_the_most_cells_are_what_counting_every_step_finds(seed: int):
    rng = random.Random(seed)
    growing = [(rng.randrange(1, 40), rng.randrange(60)) for _ in range(rng.randrange(6))]
    level = most = 0
    for step in range(1, 41):
        level += sum(tokens >= step for tokens, _ in growing)
        most = max(most, level)
        level -= sum(tokens + held for tokens, held in growing if tokens == step)
    assert most_cells(growing) == most


def test_a_reply_is_expected_to_be_as_long_as_replies_were():
    lengths = ReplyLengths()
    assert lengths.still(0, 4000) == LEAST
    for _ in range(100):
        lengths.ended(300)
    assert lengths.still(0, 4000) == 300
    assert lengths.still(100, 4000) == 200
    assert lengths.still(299, 4000) == lengths.still(900, 4000) == LEAST
    assert lengths.still(0, 20) == 20, "and never longer than it may be"


def served(n: int, n_reply: int, **config: int) -> tuple[Bench, int]:
    """The bench after `n` requests whose replies have `n_reply` tokens, and the most that ran at once."""
    bench = Bench("r" * n_reply, **config).load()
    sinks = [bench.ask(f"{i}" * 20, max_tokens=900)[0] for i in range(n)]
    most = 0
    while not all(sink.is_answered for sink in sinks):
        bench.step()
        most = max(most, len(bench.scheduler.running))
    assert all(isinstance(sink.terminal, Finished) for sink in sinks)
    return bench, most


def test_max_tokens_alone_keeps_nobody_waiting():
    """900 tokens each may come and 10 do: eight run at once in 1,000 cells."""
    bench, most = served(24, 10, n_ctx=1000, n_parallel=8)
    assert most == 8
    assert bench.service.meter.preemptions == 0


def test_long_replies_teach_the_scheduler_to_admit_fewer():
    """Eight replies of 200 tokens do not fit into 1,000 cells: once that is known, hardly anybody loses his slot."""
    bench, _ = served(60, 200, n_ctx=1000, n_parallel=8)
    early = bench.service.meter.preemptions
    sinks = [bench.ask(f"later {i}" * 4, max_tokens=900)[0] for i in range(40)]
    bench.settle(*sinks, most=20_000)
    assert early > 0
    assert bench.service.meter.preemptions - early <= early // 4
    assert bench.engine.n_rows < 100 * 230 * 1.1
