"""What only the real engine can show."""

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from llama_worker import close_all, inspect_model

pytestmark = pytest.mark.engine
# One thread: more of them wait for each other where the cores are shared.
MODEL: dict[str, Any] = {"model": "demo://smollm2-135m-instruct", "n_ctx": 2048, "n_threads": 1}


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[ChatLlamaWorker]:
    """A share that stays, so that not each test loads its own."""
    yield ChatLlamaWorker(**MODEL)
    close_all()


def test_each_turn_of_a_chat_is_prefilled_only_where_it_is_new() -> None:
    """Also at a temperature at which six of eight replies tokenize otherwise than they were sampled."""
    chat = ChatLlamaWorker(**MODEL, temperature=1.2, seed=11, max_tokens=40)
    history: list[BaseMessage] = [SystemMessage("You are a sailor who likes to talk.")]
    before = 0
    for turn in range(6):
        history.append(HumanMessage(f"Tell me a short story, number {turn}."))
        reply = chat.invoke(history)
        history.append(AIMessage(reply.text))
        usage = reply.usage_metadata
        assert usage is not None
        assert usage["input_token_details"]["cache_read"] >= before - 8
        before = usage["total_tokens"]


def test_the_three_classes_share_one_model() -> None:
    chat = ChatLlamaWorker(**MODEL, max_tokens=4)
    llm = LlamaWorkerLLM(**MODEL, max_tokens=4)
    assert chat._connect() is llm._connect()
    assert chat.invoke("Hello").text
    assert llm.invoke("Hello")


def test_the_profile_comes_from_the_header_and_the_settings() -> None:
    profile = ChatLlamaWorker(model=MODEL["model"], n_ctx=0).profile
    assert profile is not None
    assert profile["max_input_tokens"] == inspect_model(MODEL["model"]).n_ctx_train
    assert profile["name"] == inspect_model(MODEL["model"]).name


def test_embeddings_know_what_is_alike() -> None:
    model = LlamaWorkerEmbeddings(model="demo://all-minilm-l6-v2", n_threads=1)
    sea, ship, tax = model.embed_documents(["the sea and its waves", "a ship on the ocean", "income tax forms"])
    assert _dot(sea, ship) > _dot(sea, tax) + 0.1


def _dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
