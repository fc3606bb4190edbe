"""The eight ways to ask, and what they return."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.llama_worker import LlamaWorkerLLM

from llama_worker import (
    ContextOverflowError,
    DeadlineExceeded,
    GenerationCancelled,
    GenerationError,
    InvalidRequestError,
    LlamaWorker,
    UnsupportedFeatureError,
    WorkerClosed,
    WorkerDied,
    cancel_scope,
)
from llama_worker._engine.base import DecodeStatus
from llama_worker.testing import Fault, fake_loader, fake_worker

from .conftest import HELLO, Stage

Response = ChatResponse | CompletionResponse
Ask = Callable[..., Awaitable[list[Response]]]


async def collected(stream: AsyncIterator[Response]) -> list[Response]:
    return [response async for response in stream]


async def chat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return [llm.chat(HELLO, **kwargs)]


async def achat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return [await llm.achat(HELLO, **kwargs)]


async def stream_chat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return list(llm.stream_chat(HELLO, **kwargs))


async def astream_chat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return await collected(await llm.astream_chat(HELLO, **kwargs))


async def complete(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return [llm.complete("Hello", **kwargs)]


async def acomplete(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return [await llm.acomplete("Hello", **kwargs)]


async def stream_complete(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return list(llm.stream_complete("Hello", **kwargs))


async def astream_complete(llm: LlamaWorkerLLM, **kwargs: Any) -> list[Response]:
    return await collected(await llm.astream_complete("Hello", **kwargs))


STREAMS = [stream_chat, astream_chat, stream_complete, astream_complete]
PLAIN = [chat, achat, complete, acomplete]
every_way = pytest.mark.parametrize("ask", [*PLAIN, *STREAMS])
every_stream = pytest.mark.parametrize("ask", STREAMS)
every_plain = pytest.mark.parametrize("ask", PLAIN)


def text_of(response: Response) -> str | None:
    return response.message.content if isinstance(response, ChatResponse) else response.text


def test_the_class_is_a_function_calling_llm() -> None:
    """LlamaIndex's own convention for integrations: the base class is in the MRO, by name."""
    names = [cls.__name__ for cls in LlamaWorkerLLM.__mro__]
    assert BaseLLM.__name__ in names
    assert FunctionCallingLLM.__name__ in names


@every_way
async def test_the_last_response_is_the_whole_reply(ask: Ask, llm: LlamaWorkerLLM) -> None:
    last = (await ask(llm))[-1]
    assert text_of(last) == "Hi there!"
    assert str(last).endswith("Hi there!")
    assert last.raw == {
        "model": "model",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": last.raw["usage"]["prompt_tokens"], "completion_tokens": 9}
        | {"total_tokens": last.raw["usage"]["prompt_tokens"] + 9, "cached_tokens": 0, "reasoning_tokens": 0},
    }


@every_way
async def test_the_prompt_is_rendered_by_the_models_template(
    ask: Ask, llm: LlamaWorkerLLM, worker: LlamaWorker
) -> None:
    """A chat's message and an unformatted prompt are the same user message."""
    last = (await ask(llm))[-1]
    expected = worker.count_tokens([{"role": "user", "content": "Hello"}])
    assert last.raw["usage"]["prompt_tokens"] == expected > len("Hello")


@every_stream
async def test_chunks_carry_the_text_so_far_and_what_is_new(ask: Ask, llm: LlamaWorkerLLM) -> None:
    chunks = await ask(llm)
    deltas = [chunk.delta for chunk in chunks]
    assert len(chunks) > 2
    assert all(delta is not None for delta in deltas)
    assert [text_of(chunk) for chunk in chunks] == ["".join(map(str, deltas[: i + 1])) for i in range(len(deltas))]
    assert all(chunk.raw is None for chunk in chunks[:-1])
    if isinstance(chunks[0], ChatResponse):
        assert {chunk.message.role.value for chunk in chunks} == {"assistant"}


@every_way
async def test_sampling_keywords_of_a_call_replace_the_fields(ask: Ask, worker: LlamaWorker) -> None:
    llm = LlamaWorkerLLM(worker=worker, max_tokens=2)
    assert text_of((await ask(llm))[-1]) == "Hi"
    last = (await ask(llm, max_tokens=5))[-1]
    assert (text_of(last), last.raw["finish_reason"]) == ("Hi th", "length")
    assert text_of((await ask(llm, max_tokens=9, stop=["there"]))[-1]) == "Hi "


@every_way
async def test_fields_can_be_assigned(ask: Ask, llm: LlamaWorkerLLM) -> None:
    llm.max_tokens = 2
    assert text_of((await ask(llm))[-1]) == "Hi"


@every_way
@pytest.mark.parametrize(
    ("keywords", "field"), [({"temprature": 0}, "temprature"), ({"top_p": 7}, "top_p"), ({"n_ctx": 1}, "n_ctx")]
)
async def test_a_keyword_that_cannot_be_meant_is_named(
    ask: Ask, keywords: dict[str, Any], field: str, llm: LlamaWorkerLLM
) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        await ask(llm, **keywords)


@every_way
async def test_keywords_that_say_nothing_change_nothing(ask: Ask, llm: LlamaWorkerLLM) -> None:
    """LlamaIndex's programs pass them so."""
    nothing = dict.fromkeys(["tools", "tool_choice", "parallel_tool_calls", "response_format", "grammar", "timeout"])
    assert text_of((await ask(llm, **nothing))[-1]) == "Hi there!"


@every_way
async def test_text_is_no_format(ask: Ask, llm: LlamaWorkerLLM) -> None:
    """OpenAI's way to say so."""
    assert text_of((await ask(llm, response_format={"type": "text"}))[-1]) == "Hi there!"


@every_way
async def test_a_format_is_enforced(ask: Ask, llm: LlamaWorkerLLM) -> None:
    for keywords in ({"grammar": 'root ::= "a" | "b"'}, {"response_format": {"type": "choice", "choices": ["a", "b"]}}):
        assert text_of((await ask(llm, **keywords))[-1]) in ("a", "b")
    with pytest.raises(InvalidRequestError, match="verse"):
        await ask(llm, response_format={"type": "verse"})


@every_way
async def test_a_format_asked_for_twice_is_refused(ask: Ask, llm: LlamaWorkerLLM) -> None:
    with pytest.raises(InvalidRequestError, match="grammar"):
        await ask(llm, grammar='root ::= "a"', response_format={"type": "json_object"})


@pytest.mark.parametrize("ask", [complete, acomplete, stream_complete, astream_complete])
async def test_a_completion_takes_no_tools(ask: Ask, llm: LlamaWorkerLLM) -> None:
    with pytest.raises(UnsupportedFeatureError, match="chat"):
        await ask(llm, tools=[{"name": "f"}])


@every_way
async def test_logprobs_come_for_each_token(ask: Ask, llm: LlamaWorkerLLM) -> None:
    """The sampled token first, then the likeliest others; on a stream's last chunk for the whole reply."""
    responses = await ask(llm, logprobs=2)
    whole = responses[-1].logprobs
    assert whole is not None
    assert "".join(entry[0].token for entry in whole) == "Hi there!"
    assert all(2 <= len(entry) <= 3 and entry[0].bytes == list(entry[0].token.encode()) for entry in whole)
    assert [entry for chunk in responses[:-1] for entry in chunk.logprobs or ()] in ([], whole)


@every_way
async def test_no_logprobs_unless_asked_for(ask: Ask, llm: LlamaWorkerLLM) -> None:
    assert all(response.logprobs is None for response in await ask(llm))


@every_way
async def test_an_overflow_is_a_typed_error(ask: Ask) -> None:
    with fake_worker("x", n_ctx=64) as worker, pytest.raises(ContextOverflowError, match="max_tokens"):
        await ask(LlamaWorkerLLM(worker=worker, max_tokens=60))


@every_way
async def test_an_engine_failure_reaches_the_caller(ask: Ask) -> None:
    """The error of a stream is raised, and the worker serves on."""
    loader = fake_loader("Hi there!", faults=[Fault("decode", DecodeStatus.COMPUTE_FAILED, nth=3)])
    with fake_worker(loader=loader) as worker:
        with pytest.raises(GenerationError):
            await ask(LlamaWorkerLLM(worker=worker))
        assert text_of((await ask(LlamaWorkerLLM(worker=worker)))[-1]) == "Hi there!"


@every_way
async def test_the_death_of_the_worker_reaches_the_caller(ask: Ask) -> None:
    loader = fake_loader("Hi there!", faults=[Fault("sample", ValueError("broken"), nth=3)])
    with fake_worker(loader=loader) as worker, pytest.raises(WorkerDied) as caught:
        await ask(LlamaWorkerLLM(worker=worker))
    assert isinstance(caught.value.__cause__, ValueError)


@every_way
async def test_a_closed_worker_says_so(ask: Ask) -> None:
    with fake_worker("x") as worker:
        llm = LlamaWorkerLLM(worker=worker)
    with pytest.raises(WorkerClosed, match="closed"):
        await ask(llm)


@every_way
async def test_a_deadline_ends_the_request(ask: Ask, stage: Stage) -> None:
    stage.gate.shut()
    with pytest.raises(DeadlineExceeded, match="timeout"):
        await ask(stage.endless(timeout=0.05))
    assert await stage.becomes_free()


@every_plain
async def test_a_cancelled_call_raises_our_own_error(ask: Ask, llm: LlamaWorkerLLM) -> None:
    with cancel_scope() as scope:
        scope.cancel()
        with pytest.raises(GenerationCancelled):
            await ask(llm)


@every_stream
async def test_a_cancelled_stream_ends_in_order(ask: Ask, llm: LlamaWorkerLLM) -> None:
    """Chat engines hang, or lose the partial answer, when a stream ends by an exception."""
    with cancel_scope() as scope:
        scope.cancel()
        chunks = await ask(llm)
    assert [(chunk.delta, chunk.raw["finish_reason"]) for chunk in chunks] == [("", "cancelled")]


def test_a_formatted_prompt_is_raw_text(llm: LlamaWorkerLLM) -> None:
    """Its bytes and the BOS are all the tokens there are: no template."""
    for response in (llm.complete("abc", formatted=True), [*llm.stream_complete("abc", formatted=True)][-1]):
        assert response.raw["usage"]["prompt_tokens"] == len("abc") + 1


def test_a_prompt_may_be_positional_or_a_keyword(llm: LlamaWorkerLLM) -> None:
    assert llm.complete("Hello").text == llm.complete(prompt="Hello").text == "Hi there!"


@pytest.mark.parametrize("name", ["complete", "stream_complete"])
def test_a_prompt_must_be_given_once(name: str, llm: LlamaWorkerLLM) -> None:
    method: Callable[..., Any] = getattr(llm, name)
    with pytest.raises(TypeError):
        method("Hello", prompt="Hello")
    with pytest.raises(ValueError, match="No prompt"):
        method()


@pytest.mark.parametrize("name", ["acomplete", "astream_complete"])
async def test_a_prompt_must_be_given_once_to_async_methods(name: str, llm: LlamaWorkerLLM) -> None:
    method: Callable[..., Awaitable[Any]] = getattr(llm, name)
    with pytest.raises(TypeError):
        await method("Hello", prompt="Hello")
    with pytest.raises(ValueError, match="No prompt"):
        await method()


def test_own_prompt_functions_replace_the_template(worker: LlamaWorker) -> None:
    """They are framework keywords, so they must not be accepted and then ignored."""

    def of_messages(messages: Sequence[ChatMessage]) -> str:
        return "abc"

    llm = LlamaWorkerLLM(worker=worker, messages_to_prompt=of_messages, completion_to_prompt=lambda prompt: prompt * 2)
    assert llm.chat(HELLO).raw["usage"]["prompt_tokens"] == len("abc") + 1
    assert llm.complete("xy").raw["usage"]["prompt_tokens"] == len("xyxy") + 1
    assert llm.complete("xy", formatted=True).raw["usage"]["prompt_tokens"] == len("xy") + 1


async def test_predict_and_stream_add_the_system_prompt(worker: LlamaWorker) -> None:
    llm = LlamaWorkerLLM(worker=worker, system_prompt="Be brief.")
    template = PromptTemplate("About {topic}")
    assert llm.predict(template, topic="tea") == await llm.apredict(template, topic="tea") == "Hi there!"
    assert "".join(llm.stream(template, topic="tea")) == "Hi there!"
    assert "".join([token async for token in await llm.astream(template, topic="tea")]) == "Hi there!"


async def test_calls_without_tools_are_plain_chats(llm: LlamaWorkerLLM) -> None:
    """A FunctionAgent without tools passes an empty list, and looks for tool calls in every chunk."""
    history = [ChatMessage("Before", role="user"), ChatMessage("Yes", role="assistant")]
    response = llm.chat_with_tools(tools=[], user_msg="Hello", chat_history=history, tool_choice="auto")
    assert response.message.content == "Hi there!"
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    chunks = await collected(await llm.astream_chat_with_tools(tools=[], user_msg=HELLO[0], chat_history=history))
    assert text_of(chunks[-1]) == "Hi there!"
    assert len(history) == 2
