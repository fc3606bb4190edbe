"""What type checkers see of the LangChain adapter. Checked by mypy, never run."""

from collections.abc import Iterator
from typing import assert_type

from langchain_core.messages import AIMessage, AIMessageChunk

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from llama_worker import LlamaWorker


def chat(worker: LlamaWorker) -> None:
    model = ChatLlamaWorker(worker=worker, temperature=0, max_tokens=8)
    assert_type(model.invoke("hello"), AIMessage)
    assert_type(model.stream("hello"), Iterator[AIMessageChunk])
    assert_type(model.get_num_tokens("hello"), int)


def completion() -> None:
    assert_type(LlamaWorkerLLM(model="demo://smollm2-135m-instruct").invoke("Once"), str)


def embeddings() -> None:
    model = LlamaWorkerEmbeddings(model="demo://all-minilm-l6-v2")
    assert_type(model.embed_documents(["one"]), list[list[float]])
    assert_type(model.embed_query("one"), list[float])
