"""llama-worker for LlamaIndex: local GGUF embedding models that all indexes of a process share."""

from llama_index.embeddings.llama_worker.base import LlamaWorkerEmbedding

__all__ = ["LlamaWorkerEmbedding"]
