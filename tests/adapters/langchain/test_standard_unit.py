"""LangChain's own unit suites, with nothing overridden. No model is loaded."""

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings


# The suite itself calls what langchain_core warns of.
@pytest.mark.filterwarnings("ignore:.*`?dict`? .*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
class TestChatLlamaWorkerUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLlamaWorker

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo://smollm2-135m-instruct"}


class TestLlamaWorkerEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[LlamaWorkerEmbeddings]:
        return LlamaWorkerEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "demo://all-minilm-l6-v2"}
