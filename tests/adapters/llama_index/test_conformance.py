"""What LlamaIndex expects of a model that calls tools: the same claims of a scripted model and of the demo model.

LlamaIndex has no suite for its integrations. These are the claims of its own integrations' and core's tests.
"""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import close_all

from .conftest import HELLO
from .scripts import SING, SONG, SONG_TOOL, Song, call, scripted

Made = Callable[..., LlamaWorkerLLM]
Run = Callable[[LlamaWorkerLLM], Awaitable[Any]]
DEMO: dict[str, Any] = {"model": "demo://smollm2-135m-instruct", "n_ctx": 4096, "n_threads": 1}
QUESTION = "Tell me of a song. Be brief."
PROMPT = PromptTemplate("Tell me of a song about {topic}.")
OBJECT = '{"title": "Yesterday", "year": 1965}'
WEATHER = FunctionTool.from_defaults(lambda town: f"Rain in {town}.", name="weather", description="The weather.")


@pytest.fixture(scope="module")
def kept() -> Iterator[object]:
    """A share that stays, so that not each test loads its own."""
    yield LlamaWorkerLLM(**DEMO)
    close_all()


@pytest.fixture(params=["scripted", pytest.param("demo", marks=pytest.mark.engine)])
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    """Makes a model. What a scripted one says is given; the demo model says what it likes, and the claims hold."""
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 48}
    if request.param == "demo":
        request.getfixturevalue("kept")
        yield lambda *script, **more: LlamaWorkerLLM(**DEMO, **{**fields, **more})
        return
    opened: list[Any] = []

    def of_script(*script: str, **more: Any) -> LlamaWorkerLLM:
        opened.append(scripted(*(script or ("Yesterday.",)), **{**fields, "max_tokens": 600, **more}))
        return opened[-1].__enter__()

    yield of_script
    for each in opened:
        each.__exit__(None, None, None)


async def items(stream: AsyncGenerator[Any, None]) -> list[Any]:
    return [item async for item in stream]


# -- the class ----------------------------------------------------------------------------------------------------


def test_it_is_an_llm_that_calls_functions(made: Made) -> None:
    llm = made()
    assert isinstance(llm, FunctionCallingLLM)
    assert isinstance(llm, LLM)


def test_its_metadata_say_what_it_can(made: Made) -> None:
    metadata = made().metadata
    assert isinstance(metadata, LLMMetadata)
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model
    assert metadata.context_window >= 4096
    assert metadata.model_name
    assert "/" not in metadata.model_name


# -- text ---------------------------------------------------------------------------------------------------------


async def test_chat_and_complete(made: Made) -> None:
    llm = made()
    for response in (llm.chat(HELLO), await llm.achat(HELLO)):
        assert isinstance(response, ChatResponse)
        assert response.message.role == MessageRole.ASSISTANT
        assert str(response).strip()
        assert response.message.content
    for completion in (llm.complete(QUESTION), await llm.acomplete(QUESTION)):
        assert isinstance(completion, CompletionResponse)
        assert str(completion).strip()


async def test_streams_bring_the_same_text_in_pieces(made: Made) -> None:
    llm = made()
    for chunks in (list(llm.stream_chat(HELLO)), await items(await llm.astream_chat(HELLO))):
        assert all(chunk.delta is not None for chunk in chunks)
        assert "".join(chunk.delta for chunk in chunks) == chunks[-1].message.content
    for chunks in (list(llm.stream_complete(QUESTION)), await items(await llm.astream_complete(QUESTION))):
        assert all(chunk.delta is not None for chunk in chunks)
        assert "".join(chunk.delta for chunk in chunks) == chunks[-1].text


async def test_usage_is_told_on_the_last_response(made: Made) -> None:
    llm = made()
    responses: list[Any] = [llm.chat(HELLO), [*llm.stream_chat(HELLO)][-1], llm.complete(QUESTION)]
    for response in responses:
        usage = response.raw["usage"]
        assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
        assert usage["completion_tokens"] > 0
        assert response.raw["finish_reason"] in ("stop", "length")


# -- tools --------------------------------------------------------------------------------------------------------


async def chat(llm: LlamaWorkerLLM, **kwargs: Any) -> ChatResponse:
    return llm.chat_with_tools(**kwargs)


async def achat(llm: LlamaWorkerLLM, **kwargs: Any) -> ChatResponse:
    return await llm.achat_with_tools(**kwargs)


async def stream_chat(llm: LlamaWorkerLLM, **kwargs: Any) -> ChatResponse:
    return [*llm.stream_chat_with_tools(**kwargs)][-1]


async def astream_chat(llm: LlamaWorkerLLM, **kwargs: Any) -> ChatResponse:
    last: ChatResponse = (await items(await llm.astream_chat_with_tools(**kwargs)))[-1]
    return last


every_way = pytest.mark.parametrize("ask", [chat, achat, stream_chat, astream_chat])
Ask = Callable[..., Awaitable[ChatResponse]]


@every_way
async def test_a_required_call_is_made_and_valid(ask: Ask, made: Made) -> None:
    llm = made(SING)
    response = await ask(llm, tools=[SONG_TOOL], user_msg=QUESTION, tool_required=True)
    [selection] = llm.get_tool_calls_from_response(response)
    assert selection.tool_name == "generate_song"
    assert Song(**selection.tool_kwargs)
    assert selection.tool_id
    [block] = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
    assert (block.tool_call_id, block.tool_kwargs) == (selection.tool_id, selection.tool_kwargs)
    assert response.raw["finish_reason"] == "tool_calls"


@every_way
async def test_a_named_tool_is_called(ask: Ask, made: Made) -> None:
    tools = [SONG_TOOL, WEATHER]
    for tool, script in ((WEATHER, call("weather", town="Oslo")), (SONG_TOOL, SING)):
        llm = made(script, max_tokens=200)
        response = await ask(llm, tools=tools, user_msg=QUESTION, tool_choice=tool.metadata.name)
        selections = llm.get_tool_calls_from_response(response, error_on_no_tool_call=tool is SONG_TOOL)
        assert {selection.tool_name for selection in selections} <= {tool.metadata.name}


@every_way
async def test_what_is_not_allowed_is_not_called(ask: Ask, made: Made) -> None:
    llm = made(SING)
    response = await ask(llm, tools=[SONG_TOOL], user_msg=QUESTION, tool_choice="none")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []


@every_way
async def test_a_free_model_answers_or_calls_what_there_is(ask: Ask, made: Made) -> None:
    llm = made(SING)
    response = await ask(llm, tools=[SONG_TOOL], user_msg=QUESTION)
    for selection in llm.get_tool_calls_from_response(response, error_on_no_tool_call=False):
        assert Song(**selection.tool_kwargs)
    assert response.raw["finish_reason"] in ("stop", "length", "tool_calls")


async def test_ids_are_unique_in_a_conversation(made: Made) -> None:
    llm = made(f"{SING}\n{SING}", max_tokens=200)
    asked: dict[str, Any] = {"tools": [SONG_TOOL], "user_msg": QUESTION, "tool_required": True}
    responses = [llm.chat_with_tools(**asked, allow_parallel_tool_calls=True) for _ in range(2)]
    ids = [s.tool_id for r in responses for s in llm.get_tool_calls_from_response(r, error_on_no_tool_call=False)]
    assert len(ids) == len(set(ids)) >= 1


async def test_a_conversation_with_results_goes_on(made: Made) -> None:
    llm = made(SING, "Yesterday it is.")
    history = [ChatMessage(QUESTION)]
    response = llm.chat_with_tools([SONG_TOOL], chat_history=history, tool_required=True)
    [selection] = llm.get_tool_calls_from_response(response)
    result = ChatMessage("Yesterday", role="tool", additional_kwargs={"tool_call_id": selection.tool_id})
    told = [*history, response.message, result]
    assert (await llm.achat_with_tools([SONG_TOOL], chat_history=told, tool_choice="none")).message.content
    assert llm.chat([*told, ChatMessage("Be brief.", role="system")]).message.role == MessageRole.ASSISTANT


async def test_predict_and_call(made: Made) -> None:
    llm = made(SING)
    asked: dict[str, Any] = {"user_msg": QUESTION, "tool_required": True}
    for answer in (llm.predict_and_call([SONG_TOOL], **asked), await llm.apredict_and_call([SONG_TOOL], **asked)):
        [source] = answer.sources
        assert not source.is_error
        assert answer.response == f"{source.raw_input['kwargs']['title']} ({source.raw_input['kwargs']['year']})"


# -- structured answers -------------------------------------------------------------------------------------------


async def test_structured_predictions(made: Made) -> None:
    llm = made(OBJECT)
    assert isinstance(llm.structured_predict(Song, PROMPT, topic="rain"), Song)
    assert isinstance(await llm.astructured_predict(Song, PROMPT, topic="rain"), Song)
    assert isinstance([*llm.stream_structured_predict(Song, PROMPT, topic="rain")][-1], Song)
    assert isinstance((await items(await llm.astream_structured_predict(Song, PROMPT, topic="rain")))[-1], Song)


async def test_a_structured_llm(made: Made) -> None:
    structured = made(OBJECT).as_structured_llm(Song)
    for response in (structured.chat(HELLO), await structured.achat(HELLO)):
        assert isinstance(response.raw, Song)
        assert Song.model_validate_json(str(response.message.content)) == response.raw


@pytest.mark.parametrize(
    ("asked", "script", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', r"(?s)\s*\{.*\}\s*"),
        ({"response_format": {"type": "regex", "regex": "[a-c]{3}"}}, "abc", "[a-c]{3}"),
        ({"response_format": {"type": "choice", "choices": ["yes", "no"]}}, "no", "yes|no"),
        ({"grammar": 'root ::= "yes" | "no"'}, "no", "yes|no"),
    ],
    ids=["object", "regex", "choice", "gbnf"],
)
def test_a_format_is_kept(asked: dict[str, Any], script: str, pattern: str, made: Made) -> None:
    llm = made(script, max_tokens=200)
    for response in (llm.chat(HELLO, **asked).message.content, llm.complete("Hello", **asked).text):
        assert re.fullmatch(pattern, str(response))


def test_the_script_is_a_song() -> None:
    assert Song(**SONG)
