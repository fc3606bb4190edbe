"""On the real engine, with the two demo models."""

import asyncio
import copy
import pickle
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM
from pydantic import Field

from llama_worker import close_all

pytestmark = pytest.mark.engine
agents = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the workflow engine itself

QUESTION = [ChatMessage("What is the capital of France? Answer in one word.", role="user")]


LLM: dict[str, Any] = {"model": "demo://smollm2-135m-instruct", "n_ctx": 2048, "n_threads": 1}
EMBEDDING: dict[str, Any] = {"model": "demo://all-minilm-l6-v2", "n_threads": 1}


@pytest.fixture(scope="module", autouse=True)
def _kept() -> Iterator[object]:
    """Shares that stay, so that not each test loads its own."""
    yield LlamaWorkerLLM(**LLM), LlamaWorkerEmbedding(**EMBEDDING)
    close_all()


@pytest.fixture
def llm() -> LlamaWorkerLLM:
    return LlamaWorkerLLM(**LLM, temperature=0, max_tokens=24)


@pytest.fixture
def embedding() -> LlamaWorkerEmbedding:
    return LlamaWorkerEmbedding(**EMBEDDING)


def test_chat_answers(llm: LlamaWorkerLLM) -> None:
    response = llm.chat(QUESTION)
    assert "Paris" in str(response.message.content)
    assert response.raw["finish_reason"] == "stop"
    assert response.raw["usage"]["completion_tokens"] < 24


async def test_streams_answer(llm: LlamaWorkerLLM) -> None:
    chunks = list(llm.stream_chat(QUESTION))
    achunks = [chunk async for chunk in await llm.astream_chat(QUESTION)]
    for stream in (chunks, achunks):
        assert "".join(str(chunk.delta) for chunk in stream) == stream[-1].message.content
        assert "Paris" in str(stream[-1].message.content)


async def test_concurrent_calls_are_served_together(llm: LlamaWorkerLLM) -> None:
    replies = await asyncio.gather(*(llm.achat(QUESTION) for _ in range(8)))
    assert all("Paris" in str(reply.message.content) for reply in replies)


def test_metadata_before_and_after_loading_agree() -> None:
    llm = LlamaWorkerLLM(model="demo://smollm2-135m-instruct", n_ctx=0, n_kv_cells=1000, n_threads=1)
    before = llm.metadata
    llm.complete("x", max_tokens=1)
    assert before.model_name == llm.metadata.model_name
    assert before.context_window <= llm.metadata.context_window < before.context_window + 256


def test_the_tokenizer_is_the_models_own(llm: LlamaWorkerLLM) -> None:
    ids = llm.tokenizer()("The capital of France")
    assert llm._connect().detokenize(ids) == "The capital of France"
    assert len(ids) < len("The capital of France") / 2


def test_what_is_restored_attaches_to_the_same_worker(llm: LlamaWorkerLLM, embedding: LlamaWorkerEmbedding) -> None:
    """No second load: not from a dictionary, a pickle, a copy or an equal constructor."""
    for made in (llm, embedding):
        twins = [type(made).from_dict(made.to_dict()), pickle.loads(pickle.dumps(made)), copy.deepcopy(made)]
        assert all(twin._connect() is made._connect() for twin in twins)
        given = type(made)(worker=made._connect())
        assert pickle.loads(pickle.dumps(given))._connect() is made._connect()


def test_embeddings_know_what_is_similar(embedding: LlamaWorkerEmbedding) -> None:
    cat, kitten, tax = embedding.get_text_embedding_batch(["A cat.", "A kitten.", "The tax return."])
    assert len(cat) == 384
    assert embedding.similarity(cat, kitten) > embedding.similarity(cat, tax) + 0.2


async def test_retrieval_from_documents_to_an_answer(llm: LlamaWorkerLLM, embedding: LlamaWorkerEmbedding) -> None:
    texts = ["The sheep of Skarrow eat seaweed.", "The ferry leaves at nine.", "The lighthouse is painted red."]
    index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=embedding)
    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    for response in (engine.query("What do the sheep eat?"), await engine.aquery("What do the sheep eat?")):
        assert response.source_nodes[0].get_content() == texts[0]
        assert "seaweed" in str(response)


def weigh(animal: Literal["sheep", "cow"]) -> str:
    """How heavy an animal is, in kg."""
    return {"sheep": "80", "cow": "700"}[animal]


def price(kg: Annotated[int, Field(ge=1, le=999)]) -> str:
    """What so many kg cost."""
    return f"{kg * 5} coins"


class Planned(LlamaWorkerLLM):
    """Calls weigh, then price, then answers: this model is too small to plan it."""

    def _prepare_chat_with_tools(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        n_results = sum(message.role == "tool" for message in kwargs["chat_history"])
        choice = ["weigh", "price", "none"][n_results]
        return super()._prepare_chat_with_tools(*args, **{**kwargs, "tool_choice": choice, "tool_required": False})


@agents
@pytest.mark.parametrize("streaming", [True, False])
async def test_an_agent_completes_a_task_with_two_tools(streaming: bool) -> None:
    """The choice is forced, the arguments and the answer are the model's."""
    llm = Planned(**LLM, temperature=0, max_tokens=64)
    agent = FunctionAgent(tools=[weigh, price], llm=llm, streaming=streaming, allow_parallel_tool_calls=False)
    run = agent.run(user_msg="What does a sheep cost?")
    results = [event async for event in run.stream_events() if isinstance(event, ToolCallResult)]
    assert [result.tool_name for result in results] == ["weigh", "price"]
    assert not any(result.tool_output.is_error for result in results)
    output = await run
    assert output.response.content
    assert len(output.tool_calls) == 2


@agents
async def test_the_first_call_of_an_agent_may_be_forced() -> None:
    llm = LlamaWorkerLLM(**LLM, temperature=0, max_tokens=64)
    tool = FunctionTool.from_defaults(weigh, return_direct=True)
    agent = FunctionAgent(tools=[tool], llm=llm, initial_tool_choice="weigh", allow_parallel_tool_calls=False)
    assert str(await agent.run(user_msg="How heavy is a sheep?")) in ("80", "700")
