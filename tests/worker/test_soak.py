"""The soak, short but in `make proof`; and that its measures can fail."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from llama_worker import Failed, Finished, GenerationError, TextDelta, Usage
from tests.worker.resources import slope
from tests.worker.soak import N_RELOADS, Soak
from tests.worker.soak_clients import WHOLE, Journal, Question

SECONDS = 600.0 if os.environ.get("LLAMA_WORKER_PROOF") else 60.0


@pytest.mark.engine
@pytest.mark.timeout(1000)
def test_nothing_is_lost_and_nothing_grows(tmp_path: Path):
    seed = random.randrange(10**6)
    soak = Soak(tmp_path, seconds=SECONDS, seed=seed)
    soak.run()
    print(f"seed {seed}\n{soak.table()}")
    assert not soak.faults
    assert soak.n_failed == N_RELOADS // 10
    assert len(soak.journal.begun) == 14, "some kind of request was never made"


def test_the_slope_is_that_of_most_pairs():
    rising = [(float(n), 3.0 + 0.5 * n) for n in range(20)]
    assert slope([rising]) == pytest.approx(0.5)
    wild = [(n, 1000.0 if n in (3, 11, 17) else y) for n, y in rising]
    assert slope([wild]) == pytest.approx(0.5)
    assert slope([rising, [(n, y + 100) for n, y in rising]]) == pytest.approx(0.5), "each series by itself"


def test_a_request_that_never_ends_is_lost():
    journal = Journal()
    begun = journal.begin("generate")
    journal.begin("generate")
    journal.end("generate", "stop", begun)
    assert journal.lost == 1


@pytest.mark.parametrize(
    "events",
    [
        [],
        [TextDelta("a")],
        [TextDelta("a"), Finished(reason="stop", text="ab", usage=Usage())],
        [Finished(reason="stop", text="", usage=Usage()), Finished(reason="stop", text="", usage=Usage())],
        [Finished(reason="cancelled", text="", usage=Usage())],
        [Failed(error=GenerationError("no"), text="", usage=Usage())],
        [Finished(reason="stop", text="", usage=Usage(prompt_tokens=9, completion_tokens=1))],
    ],
    ids=["nothing", "no end", "text that differs", "two ends", "cancelled by nobody", "failed", "another's answer"],
)
def test_a_stream_that_is_wrong_is_noticed(events: list[object]):
    with pytest.raises(AssertionError):
        Journal().check_end(Question("hello", frozenset({7, 8})), events, expected=WHOLE)  # type: ignore[arg-type]
