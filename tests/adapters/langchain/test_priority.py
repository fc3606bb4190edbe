"""`priority` of an object or of a call is that of the worker's requests."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from llama_worker import ConfigError, InvalidRequestError, LlamaWorker

MODELS = [ChatLlamaWorker, LlamaWorkerLLM]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("of_object", "of_call", "meant"), [(0, None, 0), (2, None, 2), (0, -3, -3), (2, 0, 0)])
def test_a_call_s_goes_before_the_object_s(
    model: Any, worker: LlamaWorker, of_object: int, of_call: int | None, meant: int
) -> None:
    llm = model(worker=worker, priority=of_object)
    assert llm._call("x", None, {} if of_call is None else {"priority": of_call}).options["priority"] == meant


@pytest.mark.parametrize("model", MODELS)
def test_it_is_taken_by_every_call(model: Any, worker: LlamaWorker) -> None:
    llm = model(worker=worker, max_tokens=2, priority=1)
    assert llm.invoke("Hello", priority=3)
    assert list(llm.stream("Hello", priority=-3))
    with pytest.raises(InvalidRequestError, match="priority=9"):
        llm.invoke("Hello", priority=9)


@pytest.mark.parametrize("cls", [*MODELS, LlamaWorkerEmbeddings])
def test_one_that_cannot_be_is_refused_by_the_constructor(cls: Any) -> None:
    with pytest.raises(ConfigError, match="priority=4"):
        cls(model="/nowhere/at-all.gguf", priority=4)


def test_embeddings_have_one_too(worker: LlamaWorker) -> None:
    assert LlamaWorkerEmbeddings(worker=worker, priority=2)._options["priority"] == 2
    assert LlamaWorkerEmbeddings(worker=worker, priority=2).embed_query("Hello")


def test_it_changes_no_cache_key(worker: LlamaWorker) -> None:
    plain, first = (ChatLlamaWorker(worker=worker, priority=priority) for priority in (0, 3))
    assert plain._identifying_params == first._identifying_params
