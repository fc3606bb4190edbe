"""llama-worker for LlamaIndex: local GGUF models that all engines, agents and pipelines of a process share."""

from llama_index.llms.llama_worker._component import WorkerComponent
from llama_index.llms.llama_worker._errors import UnusableReply
from llama_index.llms.llama_worker._tokenizer import Tokenizer
from llama_index.llms.llama_worker.base import LlamaWorkerLLM

__all__ = ["LlamaWorkerLLM", "Tokenizer", "UnusableReply", "WorkerComponent"]
