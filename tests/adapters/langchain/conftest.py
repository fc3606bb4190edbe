"""Workers without a model."""

from collections.abc import Iterator

import pytest

from llama_worker import LlamaWorker, WorkerConfig
from llama_worker.testing import fake_worker
from tests.adapters.stage import Stage

ENDLESS = {"ignore_eos": True, "max_tokens": 100_000}
"""Keywords of a generation that only a cancel can end in a test's lifetime."""


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage.opened() as stage:
        yield stage


@pytest.fixture
def worker() -> Iterator[LlamaWorker]:
    """Answers whatever follows from the prompt, four at a time."""
    with fake_worker(worker_config=WorkerConfig(queue_size=64)) as worker:
        yield worker
