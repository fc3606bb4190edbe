"""What callback handlers and instrumentation see: one LLM event for each public call, exact usage, no secrets."""

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.prompts import PromptTemplate
from llama_index.embeddings.llama_worker import LlamaWorkerEmbedding
from llama_index.llms.llama_worker import LlamaWorkerLLM
from pydantic import Field

from llama_worker import LlamaWorker
from llama_worker.testing import fake_worker

from .conftest import HELLO, Recorder
from .scripts import SING, SONG_TOOL, Song, scripted

Run = Callable[[LlamaWorkerLLM], Awaitable[Any]]


async def _chat(llm: LlamaWorkerLLM) -> Any:
    return llm.chat(HELLO)


async def _achat(llm: LlamaWorkerLLM) -> Any:
    return await llm.achat(HELLO)


async def _stream_chat(llm: LlamaWorkerLLM) -> Any:
    return list(llm.stream_chat(HELLO))[-1]


async def _astream_chat(llm: LlamaWorkerLLM) -> Any:
    return [chunk async for chunk in await llm.astream_chat(HELLO)][-1]


async def _complete(llm: LlamaWorkerLLM) -> Any:
    return llm.complete("Hello")


async def _acomplete(llm: LlamaWorkerLLM) -> Any:
    return await llm.acomplete("Hello")


async def _stream_complete(llm: LlamaWorkerLLM) -> Any:
    return list(llm.stream_complete("Hello"))[-1]


async def _astream_complete(llm: LlamaWorkerLLM) -> Any:
    return [chunk async for chunk in await llm.astream_complete("Hello")][-1]


every_call = pytest.mark.parametrize(
    "run",
    [_chat, _achat, _stream_chat, _astream_chat, _complete, _acomplete, _stream_complete, _astream_complete],
)


class Events(BaseEventHandler):
    seen: list[BaseEvent] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.seen.append(event)

    def names(self) -> list[str]:
        return [event.class_name() for event in self.seen if not event.class_name().endswith("InProgressEvent")]


@pytest.fixture
def events() -> Iterator[Events]:
    dispatcher, handler = get_dispatcher(), Events()
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


@every_call
async def test_one_event_for_each_call(run: Run, worker: LlamaWorker, recorder: Recorder, events: Events) -> None:
    """Core's adapters whose complete() calls a decorated chat() are billed twice."""
    response = await run(LlamaWorkerLLM(worker=worker, callback_manager=CallbackManager([recorder])))
    assert [kind for kind, _ in recorder.starts] == [kind for kind, _ in recorder.ends] == [CBEventType.LLM]
    ended = recorder.ends[0][1]
    assert ended.get(EventPayload.RESPONSE, ended.get(EventPayload.COMPLETION)) == response
    kind = "Completion" if "complete" in run.__name__ else "Chat"
    assert events.names() == [f"LLM{kind}StartEvent", f"LLM{kind}EndEvent"]


@every_call
async def test_counted_tokens_are_the_usage(run: Run, worker: LlamaWorker) -> None:
    counter = TokenCountingHandler()
    response = await run(LlamaWorkerLLM(worker=worker, callback_manager=CallbackManager([counter])))
    usage = response.raw["usage"]
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert counter.total_llm_token_count == usage["total_tokens"]


@every_call
async def test_payloads_name_the_model_and_hold_no_path(run: Run, recorder: Recorder) -> None:
    with fake_worker("Hi", model="secret/folder/tiny") as worker:
        llm = LlamaWorkerLLM(
            worker=worker, temperature=0.5, system_prompt="secret", callback_manager=CallbackManager([recorder])
        )
        await run(llm)
        payload = recorder.starts[0][1][EventPayload.SERIALIZED]
        assert payload == llm.to_payload()
        assert (payload["model"], payload["temperature"], payload["model_name"]) == ("tiny", 0.5, "tiny")
        assert "secret" not in str(payload)
        assert "secret" not in str(LlamaWorkerEmbedding(worker=worker).to_payload())


def test_the_callers_keywords_are_reported_and_nothing_of_ours(worker: LlamaWorker, recorder: Recorder) -> None:
    llm = LlamaWorkerLLM(worker=worker, callback_manager=CallbackManager([recorder]))
    llm.chat(HELLO, max_tokens=3)
    list(llm.stream_complete("Hello", seed=1))
    assert [payload[EventPayload.ADDITIONAL_KWARGS] for _, payload in recorder.starts] == [
        {"max_tokens": 3},
        {"seed": 1},
    ]


def test_a_failed_call_ends_its_event(recorder: Recorder) -> None:
    with fake_worker("Hi", n_ctx=64) as worker:
        llm = LlamaWorkerLLM(worker=worker, max_tokens=64, callback_manager=CallbackManager([recorder]))
        with pytest.raises(Exception, match="exceed the limit"):
            llm.chat(HELLO)
        with pytest.raises(Exception, match="exceed the limit"):
            list(llm.stream_chat(HELLO))
    assert [list(payload) for _, payload in recorder.ends] == [[EventPayload.EXCEPTION]] * 2


PREDICTED = ["LLMStructuredPredictStartEvent", "LLMChatStartEvent", "LLMChatEndEvent", "LLMStructuredPredictEndEvent"]


async def test_a_structured_prediction_is_reported_as_one(events: Events) -> None:
    prompt = PromptTemplate("A song, please.")
    with scripted('{"title": "Yesterday", "year": 1965}') as llm:
        llm.structured_predict(Song, prompt)
        await llm.astructured_predict(Song, prompt)
        list(llm.stream_structured_predict(Song, prompt))
        assert [o async for o in await llm.astream_structured_predict(Song, prompt)]
    assert events.names() == PREDICTED * 4


async def test_calls_with_tools_are_one_llm_event_each(recorder: Recorder) -> None:
    with scripted(SING, callback_manager=CallbackManager([recorder])) as llm:
        llm.chat_with_tools([SONG_TOOL], "x")
        list(llm.stream_chat_with_tools([SONG_TOOL], "x"))
        await llm.achat_with_tools([SONG_TOOL], "x")
        assert [chunk async for chunk in await llm.astream_chat_with_tools([SONG_TOOL], "x")]
        llm.predict_and_call([SONG_TOOL], "x")
    assert [kind for kind, _ in recorder.ends].count(CBEventType.LLM) == 5
    for _, payload in recorder.starts:
        json.dumps(payload.get(EventPayload.ADDITIONAL_KWARGS))


def test_predict_is_one_llm_event(worker: LlamaWorker, recorder: Recorder) -> None:
    LlamaWorkerLLM(worker=worker, callback_manager=CallbackManager([recorder])).predict(PromptTemplate("Hello"))
    assert [kind for kind, _ in recorder.ends].count(CBEventType.LLM) == 1
