"""Vectors: all ways to ask, and what happens when LlamaIndex asks for everything at once."""

import asyncio
from collections.abc import Iterator

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding

from llama_worker import ContextOverflowError, LlamaWorker, WorkerConfig
from llama_worker.testing import FakeEngine, Gate, fake_loader, fake_worker

from .conftest import HELLO, Stage


@pytest.fixture
def embedder() -> Iterator[LlamaWorker]:
    with fake_worker(loader=fake_loader(embedding=True)) as worker:
        yield worker


@pytest.fixture
def embedding(embedder: LlamaWorker) -> LlamaWorkerEmbedding:
    return LlamaWorkerEmbedding(worker=embedder)


def test_the_class_is_an_embedding() -> None:
    """LlamaIndex's own convention for integrations: the base class is in the MRO, by name."""
    assert BaseEmbedding.__name__ in [cls.__name__ for cls in LlamaWorkerEmbedding.__mro__]


async def test_every_way_to_ask_gives_the_same_vectors(embedding: LlamaWorkerEmbedding, embedder: LlamaWorker) -> None:
    one, two = embedder.embed(["one", "two"])
    assert embedding.get_text_embedding("one") == await embedding.aget_text_embedding("one") == one
    assert embedding.get_query_embedding("two") == await embedding.aget_query_embedding("two") == two
    assert embedding.get_text_embedding_batch(["one", "two"]) == [one, two]
    assert await embedding.aget_text_embedding_batch(["one", "two"]) == [one, two]
    assert embedding._get_text_embeddings(["one", "two"]) == await embedding._aget_text_embeddings(["one", "two"])
    assert all(type(x) is float for x in one)


async def test_no_texts_no_vectors_and_no_worker() -> None:
    embedding = LlamaWorkerEmbedding(model="/no/such/model.gguf")
    assert embedding._get_text_embeddings([]) == await embedding._aget_text_embeddings([]) == []
    assert embedding.get_text_embedding_batch([]) == await embedding.aget_text_embedding_batch([]) == []


async def test_instructions_are_put_before_the_texts(embedder: LlamaWorker) -> None:
    embedding = LlamaWorkerEmbedding(worker=embedder, query_instruction="query: ", text_instruction="passage: ")
    query, passage = embedder.embed(["query: x", "passage: x"])
    assert embedding.get_query_embedding("x") == await embedding.aget_query_embedding("x") == query
    assert embedding.get_text_embedding("x") == await embedding.aget_text_embedding("x") == passage
    assert embedding.get_text_embedding_batch(["x"]) == await embedding.aget_text_embedding_batch(["x"]) == [passage]


def test_normalize_is_a_choice(embedder: LlamaWorker) -> None:
    def length(normalize: bool) -> float:
        vector = LlamaWorkerEmbedding(worker=embedder, normalize=normalize).get_text_embedding("x")
        return sum(x * x for x in vector)

    assert length(True) == pytest.approx(1)
    assert length(False) != pytest.approx(1)


def test_overlong_texts_are_never_cut_silently(embedder: LlamaWorker) -> None:
    text = "x" * 10_000
    with pytest.raises(ContextOverflowError, match="embed"):
        LlamaWorkerEmbedding(worker=embedder).get_text_embedding(text)
    assert len(LlamaWorkerEmbedding(worker=embedder, overlong="truncate").get_text_embedding(text)) == 16


async def test_500_batches_at_once_wait_for_room() -> None:
    """LlamaIndex starts all batches of an ingestion with one gather; the queue holds 8."""
    with fake_worker(loader=fake_loader(embedding=True), worker_config=WorkerConfig(queue_size=8)) as worker:
        embedding = LlamaWorkerEmbedding(worker=worker, embed_batch_size=2)
        texts = [f"text {i}" for i in range(1_000)]
        vectors = await embedding.aget_text_embedding_batch(texts)
        assert len(vectors) == len({tuple(vector) for vector in vectors}) == 1_000
        assert vectors[137] == embedding.get_text_embedding(texts[137])


async def test_cancelling_an_ingestion_frees_the_worker(embedder: LlamaWorker) -> None:
    gate, engines = Gate(), list[FakeEngine]()
    with fake_worker(loader=fake_loader(embedding=True, gate=gate, seen=engines.append)) as worker:
        embedding = LlamaWorkerEmbedding(worker=worker)
        gate.shut()
        task = asyncio.ensure_future(embedding.aget_text_embedding_batch([f"text {i}" for i in range(2_000)]))
        await asyncio.to_thread(gate.wait_reached)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await embedding.aget_text_embedding("free")
        assert engines[0].calls.count("embed") < 10


def test_one_object_serves_several_loops(embedding: LlamaWorkerEmbedding) -> None:
    vectors = [asyncio.run(embedding.aget_text_embedding("one")) for _ in range(3)]
    assert vectors == [vectors[0]] * 3


def test_the_embeddings_cache_spares_the_worker(embedder: LlamaWorker) -> None:
    embedding = LlamaWorkerEmbedding(worker=embedder, embeddings_cache=SimpleKVStore())
    assert embedding.get_text_embedding("one") == embedding.get_text_embedding("one")
    steps = embedder.status().steps
    embedding.get_text_embedding("one")
    assert embedder.status().steps == steps


def test_it_is_a_transformation_of_a_pipeline(embedding: LlamaWorkerEmbedding, embedder: LlamaWorker) -> None:
    """The pipeline's cache is keyed by to_dict(), so a second run finds what the first one stored."""
    pipeline = IngestionPipeline(transformations=[embedding])
    [node] = pipeline.run(nodes=[TextNode(text="one")])
    assert node.embedding == embedder.embed(["one"])[0]
    assert len(pipeline.cache.cache.get_all(pipeline.cache.collection)) == 1


def test_it_is_named_after_its_model(embedding: LlamaWorkerEmbedding) -> None:
    assert LlamaWorkerEmbedding(model="/models/bge-small.gguf").model_name == "bge-small"
    assert LlamaWorkerEmbedding(model="demo://all-minilm-l6-v2").model_name == "all-minilm-l6-v2"
    assert LlamaWorkerEmbedding(model="m.gguf", model_name="mine").model_name == "mine"


async def test_a_busy_generation_does_not_block_the_loop(stage: Stage) -> None:
    stage.gate.shut()
    stream = await stage.endless().astream_chat(HELLO)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.to_thread(stage.gate.wait_reached)
    vector = asyncio.ensure_future(LlamaWorkerEmbedding(worker=stage.worker).aget_text_embedding("x"))
    await asyncio.sleep(0)
    assert not first.done()
    stage.gate.open()
    assert len(await vector) == 16
    await first
    await stream.aclose()
    assert await stage.becomes_free()
