"""LangChain's own integration suites on the demo models, with nothing overridden."""

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings
from llama_worker import close_all, inspect_model

CHAT = "demo://smollm2-135m-instruct"
# The suite leaves it to the model whether its agent calls a tool, which 135M parameters cannot decide; and greedy
# they repeat themselves for ever inside of a text.
CHAT_PARAMS: dict[str, Any] = {
    "model": CHAT,
    "n_ctx": 2048,
    "n_threads": 1,
    "temperature": 0,
    "dry_multiplier": 0.8,
    "max_tokens": 128,
    "tool_choice": "any",
}
# The demo model does not think by itself; with this template it has begun to.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
EMBEDDING_PARAMS: dict[str, Any] = {"model": "demo://all-minilm-l6-v2", "n_threads": 1}

pytestmark = [
    pytest.mark.engine,
    # The suite asks for the v3 events, which langchain_core calls a beta.
    pytest.mark.filterwarnings("ignore:.* is in beta"),
]


@pytest.fixture(scope="module", autouse=True)
def workers() -> Any:
    """The suites make new models for each test: without a share that stays, each would load its own."""
    kept = ChatLlamaWorker(**CHAT_PARAMS), LlamaWorkerEmbeddings(**EMBEDDING_PARAMS)
    yield kept
    close_all()


class TestChatLlamaWorkerIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLlamaWorker

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return CHAT_PARAMS

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"timeout": 120, "stop": [], "max_retries": 2}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return inspect_model(CHAT).path

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {way: ["cache_read_input", "reasoning_output"] for way in ("invoke", "stream")}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatLlamaWorker(**self.standard_chat_model_params, **self.chat_model_params)
        prompt = "Say that you remember this sentence."
        model.invoke(prompt)
        return _asked(model, prompt, stream)

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        model = ChatLlamaWorker(**CHAT_PARAMS, chat_template=THINKING, reasoning_budget=16)
        answer = _asked(model, "Why is the sky blue?", stream)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
        return answer


def _asked(model: ChatLlamaWorker, prompt: str, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke(prompt)
    whole: AIMessageChunk | None = None
    for chunk in model.stream(prompt):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    return whole


class TestLlamaWorkerEmbeddingsIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[LlamaWorkerEmbeddings]:
        return LlamaWorkerEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return EMBEDDING_PARAMS
