"""Components given by the name of a model: who shares a worker, and how long it stays."""

import asyncio
import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import close_all

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _clean_registry() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def settings(tiny_llama: Path) -> dict[str, Any]:
    return {"model": str(tiny_llama), "n_ctx": 512, "n_threads": 1}


@pytest.mark.parametrize(
    "twin",
    [
        copy.copy,
        copy.deepcopy,
        lambda llm: llm.model_copy(),
        lambda llm: pickle.loads(pickle.dumps(llm)),
        lambda llm: LlamaWorkerLLM.from_dict(llm.to_dict()),
        lambda llm: LlamaWorkerEmbedding(model=llm.model, n_ctx=llm.n_ctx, n_threads=llm.n_threads),
    ],
    ids=["copy", "deepcopy", "model_copy", "pickle", "dictionary", "embedding"],
)
def test_whoever_has_equal_settings_keeps_the_worker(settings: dict[str, Any], twin: Any) -> None:
    original = LlamaWorkerLLM(**settings, max_tokens=2)
    assert original.complete("hello").raw["usage"]["completion_tokens"] <= 2
    thread = original._connect()._thread
    other = twin(original)
    del original
    gc.collect()
    assert other._connect()._thread is thread  # a test that held the worker would keep it alive


def test_the_worker_ends_with_the_last_component(settings: dict[str, Any]) -> None:
    llm, embedding = LlamaWorkerLLM(**settings, max_tokens=2), LlamaWorkerEmbedding(**settings)
    tokenizer = llm.tokenizer()
    assert tokenizer("hello")
    thread = llm._connect()._thread
    del llm, embedding
    gc.collect()
    assert thread.is_alive()  # the tokenizer uses it
    del tokenizer
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_component_whose_settings_are_changed_takes_another_worker(settings: dict[str, Any]) -> None:
    llm = LlamaWorkerLLM(**settings)
    thread = llm._connect()._thread
    llm.n_ctx = 256
    assert llm._connect().config.n_ctx == 256
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()  # nobody else had the former one


def test_one_component_serves_event_loops_that_come_and_go(settings: dict[str, Any]) -> None:
    llm, embedding = LlamaWorkerLLM(**settings, max_tokens=2, temperature=0), LlamaWorkerEmbedding(**settings)

    async def ask() -> tuple[str, list[float]]:
        stream = await llm.astream_complete("hello")
        return "".join([part.delta async for part in stream]), await embedding.aget_text_embedding("hello")

    answers = [asyncio.run(ask()) for _ in range(3)]
    assert answers == [answers[0]] * 3
    assert llm._connect().status().epoch == 1
