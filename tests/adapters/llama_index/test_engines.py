"""Query engines, chat engines and agents on top: they pass cancels through, or a scope reaches beneath them."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import TextNode
from llama_index.core.workflow.errors import WorkflowCancelledByUser
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import LlamaWorker, cancel_scope
from llama_worker.testing import fake_loader, fake_worker

from .conftest import Stage

# The workflow engine looks at every attribute of an agent, deprecated ones of pydantic included, and the
# agents call deprecated methods of the workflow engine.
agents = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NODES = [TextNode(text="Sheep eat grass."), TextNode(text="Boats float on water.")]


@pytest.fixture
def index() -> Iterator[VectorStoreIndex]:
    with fake_worker(loader=fake_loader(embedding=True)) as embedder:
        yield VectorStoreIndex(NODES, embed_model=LlamaWorkerEmbedding(worker=embedder))


@pytest.fixture
def main_loop() -> Iterator[None]:
    """Sync methods of LlamaIndex that run coroutines open a loop and leave it open, unless they find one."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


def chat_engine(kind: str, index: VectorStoreIndex, llm: LlamaWorkerLLM) -> Any:
    # The default memory of LlamaIndex leaves its database connection open, which is a warning and so an error here.
    memory = ChatMemoryBuffer.from_defaults(llm=llm, tokenizer_fn=llm.tokenizer())
    if kind == "simple":
        return SimpleChatEngine.from_defaults(llm=llm, memory=memory)
    return index.as_chat_engine(chat_mode="condense_plus_context", llm=llm, memory=memory)


@pytest.mark.usefixtures("main_loop")
@pytest.mark.parametrize("kind", ["simple", "condense_plus_context"])
def test_a_scope_cancels_beneath_a_chat_engine(kind: str, index: VectorStoreIndex, stage: Stage) -> None:
    """The engine writes its history in a thread that nothing else can stop; the partial answer is kept."""
    engine = chat_engine(kind, index, stage.endless())
    with cancel_scope() as scope:
        response = engine.stream_chat("What do sheep eat?")
    pieces = response.response_gen
    read = next(pieces)
    scope.cancel()
    read += "".join(pieces)
    assert stage.is_free()
    assert [message.role.value for message in engine.chat_history] == ["user", "assistant"]
    assert engine.chat_history[1].content == read.strip()


@pytest.mark.parametrize("kind", ["simple", "condense_plus_context"])
async def test_a_scope_cancels_beneath_an_async_chat_engine(kind: str, index: VectorStoreIndex, stage: Stage) -> None:
    engine = chat_engine(kind, index, stage.endless())
    with cancel_scope() as scope:
        response = await engine.astream_chat("What do sheep eat?")
    pieces = response.async_response_gen()
    read = await anext(pieces)
    scope.cancel()
    read += "".join([piece async for piece in pieces])
    assert await stage.becomes_free()
    assert [message.role.value for message in engine.chat_history] == ["user", "assistant"]
    assert engine.chat_history[1].content == read.strip()


@pytest.mark.parametrize("kind", ["simple", "condense_plus_context"])
async def test_chat_engines_answer_twice(kind: str, index: VectorStoreIndex, llm: LlamaWorkerLLM) -> None:
    """The second turn of the condensing engine first rewrites the question, by complete()."""
    engine = chat_engine(kind, index, llm)
    assert str(engine.chat("What do sheep eat?")) == "Hi there!"
    assert str(await engine.achat("And boats?")) == "Hi there!"
    assert len(engine.chat_history) == 4


@pytest.mark.usefixtures("main_loop")
def test_closing_the_answer_of_a_query_engine_cancels(index: VectorStoreIndex, stage: Stage) -> None:
    response: Any = index.as_query_engine(llm=stage.endless(), streaming=True).query("What do sheep eat?")
    next(response.response_gen)
    response.response_gen.close()
    assert stage.is_free()


@pytest.mark.usefixtures("main_loop")
def test_an_answer_that_nobody_reads_blocks_nobody(index: VectorStoreIndex, stage: Stage) -> None:
    response: Any = index.as_query_engine(llm=stage.endless(), streaming=True).query("What do sheep eat?")
    assert stage.is_free()
    assert response.source_nodes


async def test_cancelling_a_query_cancels(index: VectorStoreIndex, stage: Stage) -> None:
    stage.gate.shut()
    task = asyncio.ensure_future(index.as_query_engine(llm=stage.endless()).aquery("What do sheep eat?"))
    await asyncio.to_thread(stage.gate.wait_reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stage.becomes_free()


@pytest.mark.parametrize("mode", [ResponseMode.COMPACT, ResponseMode.TREE_SUMMARIZE, ResponseMode.ACCUMULATE])
async def test_synthesizers_ask_from_loops_of_their_own(
    mode: ResponseMode, index: VectorStoreIndex, llm: LlamaWorkerLLM
) -> None:
    """Inside a running loop LlamaIndex runs the coroutines of `use_async` on another loop in a thread."""
    engine = index.as_query_engine(llm=llm, response_mode=mode, use_async=True)
    assert "Hi there!" in str(engine.query("What do sheep eat?"))
    assert "Hi there!" in str(await engine.aquery("What do sheep eat?"))


@agents
async def test_a_react_agent_calls_tools_by_text() -> None:
    def weigh(animal: str) -> str:
        """How heavy an animal is."""
        return f"{animal}: 80 kg"

    call = 'Thought: I need to use a tool.\nAction: weigh\nAction Input: {"animal": "sheep"}'
    with fake_worker(call, "Thought: I can answer.\nAnswer: 80 kg.", n_ctx=20_000) as worker:
        agent = ReActAgent(tools=[weigh], llm=LlamaWorkerLLM(worker=worker), streaming=True)
        assert str(await agent.run(user_msg="How heavy is a sheep?")) == "80 kg."


@agents
async def test_cancelling_the_run_of_an_agent_cancels(stage: Stage) -> None:
    stage.gate.shut()
    run = ReActAgent(tools=[], llm=stage.endless()).run(user_msg="x")
    await asyncio.to_thread(stage.gate.wait_reached)
    await run.cancel_run()
    with pytest.raises(WorkflowCancelledByUser):
        await run
    assert await stage.becomes_free()


def test_many_threads_share_one_object(worker: LlamaWorker) -> None:
    llm = LlamaWorkerLLM(worker=worker)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: llm.complete("x").text, range(32)))
    assert replies == ["Hi there!"] * 32
