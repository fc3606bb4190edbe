"""LlamaWorkerEmbeddings: a local GGUF embedding model for LangChain."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.embeddings import Embeddings

from langchain_llama_worker._errors import mapped_errors
from langchain_llama_worker._params import ModelFields


class LlamaWorkerEmbeddings(ModelFields, Embeddings):
    """Vectors from a llama.cpp worker thread of this process: one per text, in order, as Python floats.

    ```python
    vectors = LlamaWorkerEmbeddings(model="demo://all-minilm-l6-v2").embed_documents(["one", "two"])
    ```

    Keywords: all fields of ModelConfig (`pooling` among them) or `worker`, and of WorkerConfig,
    `timeout`, `max_retries`. `normalize` scales each vector to length 1. The prefixes are put before each
    text, as models like E5 and nomic-embed want. A text that is longer than the model can read raises
    ContextOverflowError, or is cut with overlong="truncate".

    Constructing it loads nothing. Any number of threads and event loops may use one object at once.
    """

    normalize: bool = True
    overlong: Literal["error", "truncate"] = "error"
    query_prefix: str = ""
    document_prefix: str = ""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._embed([self.document_prefix + text for text in texts])

    def embed_query(self, text: str) -> list[float]:
        return self._embed([self.query_prefix + text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await self._aembed([self.document_prefix + text for text in texts])

    async def aembed_query(self, text: str) -> list[float]:
        return (await self._aembed([self.query_prefix + text]))[0]

    def _embed(self, texts: list[str]) -> list[list[float]]:
        if not texts:
            return []
        with mapped_errors():
            return self._retry.run(lambda: self._connect().embed(texts, **self._options))

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        if not texts:
            return []
        with mapped_errors():
            return await self._retry.arun(lambda: self._connect().aembed(texts, **self._options))

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "normalize": self.normalize,
            "overlong": self.overlong,
            "timeout": self.timeout,
            "priority": self.priority,
        }
