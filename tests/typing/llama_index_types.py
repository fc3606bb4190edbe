"""What type checkers see of the LlamaIndex adapter. Checked by mypy, never run."""

from typing import assert_type

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import LlamaWorker


def llm(worker: LlamaWorker) -> None:
    model = LlamaWorkerLLM(worker=worker, temperature=0.0, max_tokens=8)
    assert_type(model.chat([ChatMessage("hello")]), ChatResponse)
    assert_type(model.complete("Once"), CompletionResponse)
    assert_type(model.metadata, LLMMetadata)
    for response in model.stream_chat([ChatMessage("hello")]):
        assert_type(response, ChatResponse)


def embedding(worker: LlamaWorker) -> None:
    model = LlamaWorkerEmbedding(worker=worker)
    assert_type(model.get_text_embedding("one"), list[float])
