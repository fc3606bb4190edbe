"""llama-worker for LangChain: local GGUF models that all chains, agents and retrievers of a process share."""

from langchain_llama_worker._registering import register
from langchain_llama_worker.chat_models import ChatLlamaWorker
from langchain_llama_worker.embeddings import LlamaWorkerEmbeddings
from langchain_llama_worker.llms import LlamaWorkerLLM

__all__ = ["ChatLlamaWorker", "LlamaWorkerEmbeddings", "LlamaWorkerLLM", "register"]
