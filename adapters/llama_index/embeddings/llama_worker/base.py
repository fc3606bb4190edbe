"""LlamaWorkerEmbedding: a local GGUF embedding model for LlamaIndex."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal, Self

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.llms.llama_worker import WorkerComponent
from pydantic import Field, model_validator


class LlamaWorkerEmbedding(WorkerComponent, BaseEmbedding):
    """Vectors from a llama.cpp worker thread of this process: one per text, in order, as Python floats.

    ```python
    embedding = LlamaWorkerEmbedding(model="demo://all-minilm-l6-v2")
    vectors = embedding.get_text_embedding_batch(["one", "two"])
    ```

    Keywords: all fields of ModelConfig (`pooling` among them) or `worker`, of WorkerConfig, `timeout`,
    and those of every LlamaIndex embedding. `normalize` scales each vector to length 1. The instructions
    are put before each text as they are, as models like E5 and nomic-embed want. A text that is longer
    than the model can read raises ContextOverflowError, or is cut with overlong="truncate".

    LlamaIndex starts all batches of an ingestion at once: those that find the queue full wait for room.
    Its `embeddings_cache` tells neither models nor instructions apart: use one for each.
    """

    normalize: bool = True
    overlong: Literal["error", "truncate"] = "error"
    query_instruction: str = Field(default="", repr=False)
    text_instruction: str = Field(default="", repr=False)

    @model_validator(mode="after")
    def _name_model(self) -> Self:
        if "model_name" not in self.model_fields_set:
            self.model_name = PurePath(self.model).name.removesuffix(".gguf")
        return self

    @classmethod
    def class_name(cls) -> str:
        return "LlamaWorkerEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._embed([self.query_instruction + query])[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._aembed([self.query_instruction + query]))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._embed([self.text_instruction + text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aembed([self.text_instruction + text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embed([self.text_instruction + text for text in texts])

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._aembed([self.text_instruction + text for text in texts])

    def _embed(self, texts: list[str]) -> list[Embedding]:
        return self._connect().embed(texts, **self._options) if texts else []

    async def _aembed(self, texts: list[str]) -> list[Embedding]:
        return await self._connect().aembed(texts, **self._options) if texts else []

    @property
    def _options(self) -> dict[str, Any]:
        return {"normalize": self.normalize, "overlong": self.overlong, "timeout": self.timeout}
