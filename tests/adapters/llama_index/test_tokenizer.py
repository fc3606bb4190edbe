"""The tokenizer that LlamaIndex calls thousands of times, on event loops too."""

import pickle

from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import LlamaWorker
from llama_worker.testing import ByteTokenizer

from .conftest import HELLO, Stage


def test_it_gives_the_ids_of_the_model(llm: LlamaWorkerLLM, worker: LlamaWorker) -> None:
    tokenizer = llm.tokenizer()
    for text in ("", "abc", "Grüße", "long " * 1_000):
        assert tokenizer(text) == worker.tokenize(text) == list(text.encode())


def test_what_it_gives_belongs_to_the_caller(llm: LlamaWorkerLLM) -> None:
    tokenizer = llm.tokenizer()
    tokenizer("abc").clear()
    assert tokenizer("abc") == [97, 98, 99]


def test_it_does_not_wait_for_a_generation(stage: Stage) -> None:
    """The worker is held in the middle of a decode, and the tokenizer answers all the same."""
    llm = stage.endless()
    stream = llm.stream_chat(HELLO)
    next(stream)
    stage.gate.shut()
    stage.gate.wait_reached()
    asked = list(stage.engine.calls)
    helper = PromptHelper.from_llm_metadata(llm.metadata, tokenizer=llm.tokenizer())
    assert helper.repack(PromptTemplate("{context_str}"), ["word " * 500])
    assert TokenTextSplitter(chunk_size=64, chunk_overlap=8, tokenizer=llm.tokenizer()).split_text("word " * 500)
    assert stage.engine.calls == asked
    status = stage.worker.status()
    assert (status.queued, status.callers_waiting, status.running) == (0, 0, 1)
    stream.close()
    assert stage.is_free()


async def test_a_memory_counts_with_it(stage: Stage) -> None:
    memory = ChatMemoryBuffer.from_defaults(token_limit=20, tokenizer_fn=stage.endless().tokenizer())
    await memory.aput_messages(HELLO * 20)
    assert 0 < len(await memory.aget()) < 20
    assert stage.engine.n_rows == 0


def test_repeated_texts_are_remembered(llm: LlamaWorkerLLM, worker: LlamaWorker) -> None:
    vocabulary = worker._view().vocabulary
    assert isinstance(vocabulary, ByteTokenizer)
    tokenizer = llm.tokenizer()
    before = vocabulary.n_calls
    for _ in range(100):
        tokenizer("abc")
    assert vocabulary.n_calls == before + 1


def test_it_follows_a_reload(llm: LlamaWorkerLLM, worker: LlamaWorker) -> None:
    tokenizer = llm.tokenizer()
    tokenizer("abc")
    worker.reload(model="fake://other")
    vocabulary = worker._view().vocabulary
    assert isinstance(vocabulary, ByteTokenizer)
    assert tokenizer("abc") == [97, 98, 99]
    assert vocabulary.n_calls == 1


def test_it_pickles_with_its_component() -> None:
    llm = LlamaWorkerLLM(model="/no/such/model.gguf", n_ctx=99)
    twin = pickle.loads(pickle.dumps(llm.tokenizer()))
    assert twin._component.to_dict() == llm.to_dict()
