"""Models given by name: who shares a worker, and how long it stays."""

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import ConfigurableField

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from llama_worker import ModelConfig, close_all, get_handle, get_worker
from tests import synth

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _clean_registry() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def settings(tiny_llama: Path) -> dict[str, Any]:
    return {"model": str(tiny_llama), "n_ctx": 512, "n_threads": 1}


@pytest.fixture
def sampling() -> dict[str, Any]:
    return {"max_tokens": 2, "temperature": 0}


def thread_of(settings: dict[str, Any]) -> threading.Thread | None:
    """The thread of the worker that these settings have opened. A test that held the worker would keep it alive."""
    worker = get_handle(ModelConfig(**settings)).opened
    return None if worker is None or worker.is_closed else worker._thread


def test_equal_settings_share_one_worker_whatever_they_are_for(
    settings: dict[str, Any], sampling: dict[str, Any]
) -> None:
    chat, llm = ChatLlamaWorker(**settings, **sampling), LlamaWorkerLLM(**settings, seed=3)
    embeddings = LlamaWorkerEmbeddings(**settings)
    assert thread_of(settings) is None
    assert chat.invoke("hello").usage_metadata is not None
    assert chat._connect() is llm._connect() is embeddings._connect() is get_worker(ModelConfig(**settings))


def test_what_is_configured_for_one_call_leaves_the_model_loaded_for_the_next(
    settings: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """LangChain makes another object for each such call, and none of them ever uses the original."""
    model = ChatLlamaWorker(**settings, **sampling).configurable_fields(max_tokens=ConfigurableField(id="n"))
    threads = []
    for n in (1, 2, 3):
        answer = model.with_config(configurable={"n": n}).invoke("hello")
        assert answer.usage_metadata["output_tokens"] == n  # type: ignore[index]
        gc.collect()
        threads.append(thread_of(settings))
    assert threads[0] is not None
    assert threads == [threads[0]] * 3


@pytest.mark.parametrize(
    "twin",
    [copy.copy, copy.deepcopy, lambda model: model.model_copy(), lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "deepcopy", "model_copy", "pickle"],
)
def test_a_copy_keeps_the_worker_when_the_original_is_gone(
    settings: dict[str, Any], sampling: dict[str, Any], twin: Any
) -> None:
    original = ChatLlamaWorker(**settings, **sampling)
    text = original.invoke("hello").text
    thread = original._connect()._thread
    copied = twin(original)
    del original
    gc.collect()
    assert copied.invoke("hello").text == text
    assert copied._connect()._thread is thread


def test_a_copy_with_other_settings_takes_nothing_from_the_original(settings: dict[str, Any]) -> None:
    model = LlamaWorkerLLM(**settings)
    thread = model._connect()._thread
    other = model.model_copy(update={"n_ctx": 256})
    assert other._connect()._thread is not thread
    gc.collect()
    assert model._connect()._thread is thread


def test_the_worker_ends_with_the_last_object_that_names_it(settings: dict[str, Any], sampling: dict[str, Any]) -> None:
    chat, embeddings = ChatLlamaWorker(**settings, **sampling), LlamaWorkerEmbeddings(**settings)
    chat.invoke("hello")
    thread = chat._connect()._thread
    del chat
    gc.collect()
    assert embeddings._connect()._thread is thread
    del embeddings
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_model_that_a_call_has_named_stays_for_the_next_call(
    settings: dict[str, Any], sampling: dict[str, Any], tmp_path: Path
) -> None:
    chat, other = ChatLlamaWorker(**settings, **sampling), str(synth.llama(tmp_path / "other.gguf"))
    named = {**settings, "model": other}
    assert chat.invoke("hello", model=other).response_metadata["model_name"] == other
    thread = thread_of(named)
    assert thread is not None
    gc.collect()
    assert chat.invoke("hello").response_metadata["model_name"] == settings["model"]
    assert chat.invoke("hello", model=other).text is not None
    assert thread_of(named) is thread


def test_one_object_serves_event_loops_that_come_and_go(settings: dict[str, Any], sampling: dict[str, Any]) -> None:
    chat, embeddings = ChatLlamaWorker(**settings, **sampling), LlamaWorkerEmbeddings(**settings)

    async def ask() -> tuple[str, list[float]]:
        return "".join([chunk.text async for chunk in chat.astream("hello")]), await embeddings.aembed_query("hello")

    answers = [asyncio.run(ask()) for _ in range(3)]
    assert answers == [answers[0]] * 3
    assert answers[0] == (chat.invoke("hello").text, embeddings.embed_query("hello"))
    assert chat._connect().status().epoch == 1
