"""LoRA adapters through both frameworks: a field of the object, a keyword of the call, one worker for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.llms.llama_worker import LlamaWorkerLLM as IndexLLM

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerLLM
from llama_worker import ConfigError, InvalidRequestError, LlamaWorker, ModelConfig
from llama_worker.testing import fake_worker

PATHS = {"a": "fake://a", "b": "fake://b"}
MORE = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def worker() -> Iterator[LlamaWorker]:
    with fake_worker(lora_paths=PATHS) as worker:
        yield worker


def expected(worker: LlamaWorker, loras: Any) -> str:
    return worker.generate([{"role": "user", "content": "hello"}], loras=loras, **MORE).text


async def test_langchain_takes_them_for_an_object_and_for_a_call(worker: LlamaWorker):
    base, half, other = (expected(worker, loras) for loras in ((), {"a": 0.5}, "b"))
    assert len({base, half, other}) == 3
    chat = ChatLlamaWorker(worker=worker, loras={"a": 0.5}, **MORE)
    assert chat.invoke("hello").text == half
    assert (await chat.ainvoke("hello")).text == half
    assert "".join(chunk.text for chunk in chat.stream("hello")) == half
    assert chat.invoke("hello", loras=["b"]).text == other
    assert chat.bind(loras="b").invoke("hello").text == other
    assert chat.invoke("hello", loras={}).text == base
    assert chat.invoke("hello", loras=None).text == half
    assert chat._identifying_params["loras"] == {"a": 0.5}
    with pytest.raises(InvalidRequestError, match=r"loras='c': the adapters that are loaded are 'a', 'b'"):
        chat.invoke("hello", loras="c")


def test_a_langchain_completion_takes_them(worker: LlamaWorker):
    text = worker.generate("hello", loras="a", **MORE).text
    assert LlamaWorkerLLM(worker=worker, loras="a", **MORE).invoke("hello") == text
    assert LlamaWorkerLLM(worker=worker, **MORE).invoke("hello", loras="a") == text


async def test_llama_index_takes_them_for_an_object_and_for_a_call(worker: LlamaWorker):
    base, half, other = (expected(worker, loras) for loras in ((), {"a": 0.5}, "b"))
    llm = IndexLLM(worker=worker, loras={"a": 0.5}, **MORE)
    assert llm.complete("hello").text == half
    assert (await llm.acomplete("hello")).text == half
    assert [chunk.text for chunk in llm.stream_complete("hello")][-1] == half
    assert llm.complete("hello", loras=["b"]).text == other
    assert llm.complete("hello", loras={}).text == base
    assert llm.complete("hello", formatted=True).text == worker.generate("hello", loras={"a": 0.5}, **MORE).text
    assert IndexLLM.from_dict(llm.to_dict() | {"model": "fake://model"}).loras == {"a": 0.5}
    with pytest.raises(InvalidRequestError, match="loras='c'"):
        llm.complete("hello", loras="c")


@pytest.mark.parametrize("cls", [ChatLlamaWorker, LlamaWorkerLLM, IndexLLM])
def test_what_is_loaded_is_a_setting_of_the_model(cls: Any):
    """Constructing reads nothing; equal settings are equal however they are written."""
    config = cls(model="/nowhere.gguf", lora_paths={"b": "/y", "a": "/x"})
    same = cls(model="/nowhere.gguf", lora_paths=[("a", "/x"), ("b", "/y")])
    meant = [ModelConfig(model="/nowhere.gguf", lora_paths=one.lora_paths) for one in (config, same)]
    assert meant[0] == meant[1]
    with pytest.raises(ConfigError, match="lora_paths"):
        cls(model="/nowhere.gguf", lora_paths={"a": ""})
    with pytest.raises(ConfigError, match="loras"):
        cls(model="/nowhere.gguf", loras=3.5)


@pytest.mark.parametrize("cls", [ChatLlamaWorker, LlamaWorkerLLM, IndexLLM])
def test_beside_a_worker_others_than_its_own_are_refused(cls: Any, worker: LlamaWorker):
    with pytest.raises(ConfigError, match="lora_paths"):
        cls(worker=worker, lora_paths={"a": "fake://other"})
    cls(worker=worker)


def test_langchain_takes_a_worker_s_own_spelt_out(worker: LlamaWorker):
    assert ChatLlamaWorker(worker=worker, lora_paths=PATHS).invoke("hello").text
