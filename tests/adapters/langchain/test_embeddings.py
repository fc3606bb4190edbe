"""LlamaWorkerEmbeddings over a fake engine: one vector for each text, in order."""

import asyncio
import copy
import math
import pickle
from collections.abc import Iterator

import pytest

from langchain_llama_worker import LlamaWorkerEmbeddings
from llama_worker import ContextOverflowError, LlamaWorker
from llama_worker.testing import fake_loader, fake_worker
from tests.adapters.langchain.conftest import Stage

TEXTS = ["one", "two", "three"]


@pytest.fixture
def embedder() -> Iterator[LlamaWorker]:
    with fake_worker(loader=fake_loader(embedding=True)) as worker:
        yield worker


async def test_one_vector_for_each_text_in_order(embedder: LlamaWorker) -> None:
    model = LlamaWorkerEmbeddings(worker=embedder)
    vectors = model.embed_documents(TEXTS)
    assert vectors == [model.embed_query(text) for text in TEXTS]
    assert await model.aembed_documents(TEXTS) == vectors
    assert await model.aembed_query("two") == vectors[1]
    assert all(type(value) is float for vector in vectors for value in vector)


async def test_no_texts_are_no_vectors(embedder: LlamaWorker) -> None:
    model = LlamaWorkerEmbeddings(worker=embedder)
    assert model.embed_documents([]) == []
    assert await model.aembed_documents([]) == []


def test_vectors_have_length_one_unless_asked_otherwise(embedder: LlamaWorker) -> None:
    plain = LlamaWorkerEmbeddings(worker=embedder, normalize=False).embed_query("x")
    unit = LlamaWorkerEmbeddings(worker=embedder).embed_query("x")
    assert math.hypot(*unit) == pytest.approx(1)
    assert math.hypot(*plain) != pytest.approx(1)


def test_prefixes_are_put_before_the_texts(embedder: LlamaWorker) -> None:
    plain = LlamaWorkerEmbeddings(worker=embedder)
    e5 = LlamaWorkerEmbeddings(worker=embedder, query_prefix="query: ", document_prefix="passage: ")
    assert e5.embed_query("x") == plain.embed_query("query: x")
    assert e5.embed_documents(["x"]) == [plain.embed_query("passage: x")]


def test_a_text_too_long_is_an_error_or_cut(embedder: LlamaWorker) -> None:
    with pytest.raises(ContextOverflowError):
        LlamaWorkerEmbeddings(worker=embedder).embed_query("x" * 10_000)
    assert LlamaWorkerEmbeddings(worker=embedder, overlong="truncate").embed_query("x" * 10_000)


async def test_cancelling_a_task_leaves_the_worker_free(stage: Stage) -> None:
    model = LlamaWorkerEmbeddings(worker=stage.worker)
    stage.gate.shut()
    task = asyncio.ensure_future(model.aembed_documents(["x"] * 500))
    await asyncio.to_thread(stage.gate.wait_reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(stage.is_free)


def test_copies_share_the_live_worker_and_names_survive_pickling(embedder: LlamaWorker) -> None:
    model = LlamaWorkerEmbeddings(worker=embedder, document_prefix="p")
    assert copy.deepcopy(model).worker is embedder
    named = LlamaWorkerEmbeddings(model="/nowhere.gguf", overlong="truncate")
    assert pickle.loads(pickle.dumps(named)) == named


def test_one_object_serves_several_event_loops(embedder: LlamaWorker) -> None:
    model = LlamaWorkerEmbeddings(worker=embedder)
    assert [asyncio.run(model.aembed_query("x")) for _ in range(3)] == [model.embed_query("x")] * 3
