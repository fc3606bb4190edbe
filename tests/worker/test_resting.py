"""A worker that has nothing to compute keeps no OpenMP threads: a second team slows the first one down."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llama_worker._engine.library import library
from llama_worker._engine.llama import load
from tests.worker.bench import Bench

_has_teams = pytest.mark.skipif(sys.platform != "linux", reason="libgomp's threads are counted on Linux")


def threads() -> int:
    return psutil.Process().num_threads()


@pytest.fixture
def before() -> Callable[[], int]:
    """How many threads there were, with the library loaded and this thread's own team gone."""
    library().let_team_go()
    n = threads()
    return lambda: threads() - n


def test_the_engine_rests_when_the_last_request_was_answered():
    bench = Bench("one", "two").load()
    first, _ = bench.ask("a")
    second, _ = bench.ask("b")
    while not (first.is_answered and second.is_answered):
        assert bench.engine.n_rests == 0
        bench.step()
    bench.step(3)
    assert bench.engine.n_rests == 1


def test_the_engine_rests_again_after_each_request():
    bench = Bench("one").load()
    for n in (1, 2, 3):
        sink, _ = bench.ask("a")
        bench.settle(sink)
        bench.step()
        assert bench.engine.n_rests == n


@_has_teams
def test_loading_leaves_no_team_behind(tiny_llama: Path, before: Callable[[], int]):
    bench = Bench(loader=load, model=str(tiny_llama), n_threads=2, n_ctx=128).load()
    assert before() == 0
    bench.service.loaded.engine.close()  # type: ignore[union-attr]


@_has_teams
def test_a_team_computes_and_is_let_go_when_the_worker_is_idle(tiny_llama: Path, before: Callable[[], int]):
    bench = Bench(loader=load, model=str(tiny_llama), n_threads=2, n_ctx=128).load()
    sink, _ = bench.ask("hello", max_tokens=8, temperature=0.0)
    bench.step()
    assert before() == 1
    bench.settle(sink)
    bench.step()
    assert before() == 0
    bench.service.loaded.engine.close()  # type: ignore[union-attr]
