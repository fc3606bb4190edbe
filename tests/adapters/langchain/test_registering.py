"""register(): init_chat_model and init_embeddings know us, or say in words why not."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from langchain.chat_models import init_chat_model
from langchain.embeddings import init_embeddings

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, register
from llama_worker import UnsupportedFeatureError

CHAT: Any = importlib.import_module("langchain.chat_models.base")
EMBEDDINGS: Any = importlib.import_module("langchain.embeddings.base")


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (CHAT, EMBEDDINGS):
        monkeypatch.setattr(module, "_BUILTIN_PROVIDERS", dict(module._BUILTIN_PROVIDERS))
    CHAT._get_chat_model_creator.cache_clear()
    EMBEDDINGS._get_embeddings_class_creator.cache_clear()
    yield
    CHAT._get_chat_model_creator.cache_clear()
    EMBEDDINGS._get_embeddings_class_creator.cache_clear()


def test_without_it_langchain_knows_nothing_of_us() -> None:
    with pytest.raises(ValueError):
        init_chat_model("llama_worker:/nowhere.gguf")


def test_with_it_both_find_our_classes_by_name() -> None:
    register()
    register()
    chat = init_chat_model("llama_worker:/models/a:b.gguf", temperature=0, n_ctx=99)
    assert isinstance(chat, ChatLlamaWorker)
    assert (chat.model, chat.temperature, chat.n_ctx) == ("/models/a:b.gguf", 0, 99)
    demo = init_chat_model("demo://smollm2-135m-instruct", model_provider="llama_worker")
    assert isinstance(demo, ChatLlamaWorker)
    embeddings = init_embeddings("llama_worker:demo://all-minilm-l6-v2")
    assert isinstance(embeddings, LlamaWorkerEmbeddings)
    assert embeddings.model == "demo://all-minilm-l6-v2"


def test_a_model_that_is_chosen_at_run_time_can_be_ours() -> None:
    register()
    chosen = init_chat_model(configurable_fields=("model", "model_provider"))
    made = chosen._model({"configurable": {"model": "llama_worker:/nowhere.gguf"}})  # type: ignore[attr-defined]
    assert isinstance(made, ChatLlamaWorker)


@pytest.mark.parametrize(
    "table",
    [None, [], {}, {"openai": "langchain_openai"}, {"openai": ("a", "b")}, {"openai": ("a", "b", "c")}],
    ids=str,
)
@pytest.mark.parametrize("module", [CHAT, EMBEDDINGS], ids=["chat", "embeddings"])
def test_a_table_that_has_changed_is_left_alone(monkeypatch: pytest.MonkeyPatch, module: Any, table: Any) -> None:
    monkeypatch.setattr(module, "_BUILTIN_PROVIDERS", table)
    with pytest.raises(UnsupportedFeatureError, match=f"register.. with this version of {module.__name__}"):
        register()
    for other in {CHAT, EMBEDDINGS} - {module}:
        assert "llama_worker" not in other._BUILTIN_PROVIDERS
    assert not isinstance(table, dict) or "llama_worker" not in table


def test_a_table_that_is_gone_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(CHAT, "_BUILTIN_PROVIDERS")
    with pytest.raises(UnsupportedFeatureError, match="construct ChatLlamaWorker"):
        register()


def test_without_langchain_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain.chat_models.base", None)
    with pytest.raises(UnsupportedFeatureError, match="install langchain"):
        register()


def test_the_name_of_somebody_else_is_not_taken_from_them() -> None:
    CHAT._BUILTIN_PROVIDERS["llama_worker"] = ("elsewhere", "Chat", dict)
    with pytest.raises(UnsupportedFeatureError, match="elsewhere"):
        register()
    assert CHAT._BUILTIN_PROVIDERS["llama_worker"][0] == "elsewhere"
    assert "llama_worker" not in EMBEDDINGS._BUILTIN_PROVIDERS
