"""What type checkers see of the LlamaIndex adapter. Checked by mypy, never run."""

from typing import assert_type

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LLMMetadata
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.utils import FlexibleModel
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import BaseTool
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM
from pydantic import BaseModel

from llama_worker import LlamaWorker


def llm(worker: LlamaWorker) -> None:
    model = LlamaWorkerLLM(worker=worker, temperature=0.0, max_tokens=8)
    assert_type(model.chat([ChatMessage("hello")]), ChatResponse)
    assert_type(model.complete("Once"), CompletionResponse)
    assert_type(model.metadata, LLMMetadata)
    for response in model.stream_chat([ChatMessage("hello")]):
        assert_type(response, ChatResponse)


class Song(BaseModel):
    title: str


async def tools_and_objects(worker: LlamaWorker, tool: BaseTool, prompt: PromptTemplate) -> None:
    model = LlamaWorkerLLM(worker=worker, enable_thinking=False, reasoning_budget=64, react_stop=True)
    response = model.chat_with_tools([tool], "hello", tool_required=True)
    assert_type(response, ChatResponse)
    assert_type(model.get_tool_calls_from_response(response), list[ToolSelection])
    assert_type(model.structured_predict(Song, prompt), Song)
    assert_type(await model.astructured_predict(Song, prompt, llm_kwargs={"max_tokens": 9}), Song)
    for partial in model.stream_structured_predict(Song, prompt):
        assert_type(partial, Song | FlexibleModel)
    async for apartial in await model.astream_structured_predict(Song, prompt):
        assert_type(apartial, Song | FlexibleModel)


def embedding(worker: LlamaWorker) -> None:
    model = LlamaWorkerEmbedding(worker=worker)
    assert_type(model.get_text_embedding("one"), list[float])
