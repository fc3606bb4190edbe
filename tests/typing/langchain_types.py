"""What type checkers see of the LangChain adapter. Checked by mypy, never run."""

from collections.abc import Iterator
from typing import Any, assert_type

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM, register
from llama_worker import LlamaWorker, ResponseFormat


class Point(BaseModel):
    x: int


def chat(worker: LlamaWorker) -> None:
    model = ChatLlamaWorker(worker=worker, temperature=0, max_tokens=8, tool_choice="any", enable_thinking=False)
    assert_type(model.invoke("hello"), AIMessage)
    assert_type(model.stream("hello"), Iterator[AIMessageChunk])
    assert_type(model.get_num_tokens("hello"), int)


def tools(worker: LlamaWorker) -> None:
    bound = ChatLlamaWorker(worker=worker).bind_tools([Point], tool_choice=True, parallel_tool_calls=False)
    assert_type(bound, Runnable[LanguageModelInput, AIMessage])
    assert_type(bound.invoke("hello").tool_calls[0]["args"], dict[str, Any])


def structured(worker: LlamaWorker) -> None:
    model = ChatLlamaWorker(worker=worker)
    point: Point = model.with_structured_output(Point, method="json_schema", strict=True).invoke("hello")
    assert_type(point.x, int)
    model.with_structured_output(None, method="json_mode").invoke("hello")


def completion() -> None:
    assert_type(LlamaWorkerLLM(model="demo://smollm2-135m-instruct").invoke("Once"), str)
    LlamaWorkerLLM(model="m.gguf", response_format=ResponseFormat(type="regex", regex="[0-9]+"))


def embeddings() -> None:
    model = LlamaWorkerEmbeddings(model="demo://all-minilm-l6-v2")
    assert_type(model.embed_documents(["one"]), list[list[float]])
    assert_type(model.embed_query("one"), list[float])


def registering() -> None:
    register()
