"""Objects of a class as replies: the schema in the prompt, held to while it is sampled, read whole and in pieces."""

import json
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, TextBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.program.utils import FlexibleModel
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.llama_worker import LlamaWorkerLLM, UnusableReply
from llama_index.llms.llama_worker._schemas import demanded
from llama_index.llms.llama_worker._structured import Growing, keywords_for, whole, with_schema
from pydantic import BaseModel, Field, RootModel, field_validator

from llama_worker import InvalidOutputError, InvalidRequestError, ResponseFormat, cancel_scope

from .conftest import Recorder
from .scripts import SONG, Song, call, scripted, thought

Ask = Callable[..., Awaitable[list[Any]]]
PROMPT = PromptTemplate("A song about {topic}, please.")
JSON = '{"title": "Yesterday", "year": 1965}'
SING = call("Song", **SONG)
YESTERDAY = Song(title="Yesterday", year=1965)


async def predict(llm: LlamaWorkerLLM, cls: type[BaseModel] = Song, **kwargs: Any) -> list[Any]:
    return [llm.structured_predict(cls, PROMPT, topic="the past", **kwargs)]


async def apredict(llm: LlamaWorkerLLM, cls: type[BaseModel] = Song, **kwargs: Any) -> list[Any]:
    return [await llm.astructured_predict(cls, PROMPT, topic="the past", **kwargs)]


async def stream(llm: LlamaWorkerLLM, cls: type[BaseModel] = Song, **kwargs: Any) -> list[Any]:
    return list(llm.stream_structured_predict(cls, PROMPT, topic="the past", **kwargs))


async def astream(llm: LlamaWorkerLLM, cls: type[BaseModel] = Song, **kwargs: Any) -> list[Any]:
    return [o async for o in await llm.astream_structured_predict(cls, PROMPT, topic="the past", **kwargs)]


STREAMS = [stream, astream]
every_way = pytest.mark.parametrize("ask", [predict, apredict, *STREAMS])
every_stream = pytest.mark.parametrize("ask", STREAMS)


@every_way
async def test_an_object_is_predicted(ask: Ask) -> None:
    with scripted(JSON) as llm:
        assert (await ask(llm))[-1] == YESTERDAY


@every_way
async def test_a_thought_comes_before_and_is_no_part_of_it(ask: Ask) -> None:
    with scripted(thought("A song.", JSON)) as llm:
        assert (await ask(llm))[-1] == YESTERDAY


@every_way
async def test_whatever_the_model_would_say_is_held_to_the_schema(ask: Ask) -> None:
    with scripted('Never!{"title":7,"year":1800,"other":true') as llm:
        assert isinstance((await ask(llm))[-1], Song)


@every_stream
async def test_what_there_is_of_an_object_grows(ask: Ask) -> None:
    """It never starts again from nothing, as LlamaIndex's own reader does at each key that is half written."""
    with scripted(JSON) as llm:
        seen = await ask(llm)
    titles = [getattr(partial, "title", None) or "" for partial in seen]
    assert titles[-1] == "Yesterday"
    assert "Yest" in titles
    assert all(later.startswith(earlier) for earlier, later in pairwise(titles))
    assert isinstance(seen[0], FlexibleModel)
    assert seen[-1] == YESTERDAY


@every_way
async def test_the_schema_and_the_system_prompt_reach_the_model(ask: Ask, recorder: Recorder) -> None:
    """In the async methods too, where LlamaIndex's own programs forget the latter."""
    with scripted(JSON, system_prompt="Be brief.", callback_manager=CallbackManager([recorder])) as llm:
        await ask(llm)
    [(_, payload)] = recorder.starts
    system, user = payload[EventPayload.MESSAGES]
    assert (system.role.value, system.blocks[0].text) == ("system", "Be brief.")
    assert '"title": "Song"' in system.content
    assert user.content == "A song about the past, please."


@every_way
async def test_one_event_for_each_prediction(ask: Ask, recorder: Recorder) -> None:
    with scripted(JSON, callback_manager=CallbackManager([recorder])) as llm:
        await ask(llm)
    assert [kind for kind, _ in recorder.starts] == [kind for kind, _ in recorder.ends] == [CBEventType.LLM]


@every_way
async def test_keywords_of_the_call_are_honoured_and_stay_the_callers(ask: Ask) -> None:
    """What only LlamaIndex's own programs use is left out, as they do."""
    given = {"max_tokens": 5, "tool_choice": "auto", "allow_parallel_tool_calls": True, "tool_required": True}
    before = dict(given)
    with scripted(JSON) as llm:
        with pytest.raises(UnusableReply, match="max_tokens"):
            await ask(llm, llm_kwargs=given)
        assert given == before
        with pytest.raises(InvalidRequestError, match="temprature"):
            await ask(llm, llm_kwargs={"temprature": 1})
        with pytest.raises(InvalidRequestError, match="response_format"):
            await ask(llm, llm_kwargs={"response_format": {"type": "json_object"}})


class Old(Song):
    @field_validator("year")
    @classmethod
    def _old(cls, year: int) -> int:
        if year > 1950:
            raise ValueError(f"{year} is not old")
        return year


@every_way
async def test_what_a_schema_cannot_say_is_checked_afterwards(ask: Ask) -> None:
    """And the error says where, and nothing of what the model said."""
    with scripted(JSON) as llm, pytest.raises(UnusableReply, match="value_error in year") as caught:
        await ask(llm, Old)
    assert "1965" not in str(caught.value)
    assert caught.value.__suppress_context__


class Songs(RootModel[list[Song]]):
    """Songs."""


@every_way
async def test_an_object_may_be_a_list(ask: Ask) -> None:
    with scripted(f"[{JSON}, {JSON}]") as llm:
        assert (await ask(llm, Songs))[-1] == Songs([YESTERDAY, YESTERDAY])


class Aliased(BaseModel):
    title: str = Field(alias="songTitle", max_length=24)
    singers: list[str] = Field(default_factory=list, max_length=3)


@every_way
async def test_fields_go_by_their_aliases(ask: Ask) -> None:
    with scripted('{"songTitle": "Yesterday", "singers": ["Paul"]}') as llm:
        assert (await ask(llm, Aliased))[-1] == Aliased(songTitle="Yesterday", singers=["Paul"])


class Tagged(BaseModel):
    """Sets, at the top and below."""

    tags: set[str]
    others: list[frozenset[int]] = Field(default_factory=list)
    uniqueItems: bool = False


TWICE = '{"tags": ["old", "old", "sad"], "others": [[1, 1]], "uniqueItems": true}'
ONCE = Tagged(tags={"old", "sad"}, others=[frozenset({1})], uniqueItems=True)


@every_way
@pytest.mark.parametrize("mode", [PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION])
async def test_what_is_told_twice_is_in_a_set_once(ask: Ask, mode: PydanticProgramMode) -> None:
    reply = TWICE if mode == PydanticProgramMode.DEFAULT else call("Tagged", **json.loads(TWICE))
    with scripted(reply, pydantic_program_mode=mode) as llm:
        assert (await ask(llm, Tagged))[-1] == ONCE


@every_way
async def test_a_set_that_is_too_small_is_none(ask: Ask) -> None:
    class Pair(BaseModel):
        tags: set[str] = Field(min_length=2)

    with scripted('{"tags": ["old", "old"]}') as llm, pytest.raises(UnusableReply, match="too_short in tags"):
        await ask(llm, Pair)


@every_way
@pytest.mark.parametrize("twice", [(), ("old",)])
async def test_uniqueness_that_a_class_does_not_mend_is_checked(ask: Ask, twice: tuple[str, ...]) -> None:
    class Listed(BaseModel):
        tags: list[str] = Field(json_schema_extra={"uniqueItems": True})

    with scripted(json.dumps({"tags": ["old", *twice]})) as llm:
        if not twice:
            assert (await ask(llm, Listed))[-1] == Listed(tags=["old"])
            return
        with pytest.raises(InvalidOutputError, match="uniqueItems"):
            await ask(llm, Listed)


def test_a_users_own_schema_is_checked_whole() -> None:
    schema = Tagged.model_json_schema()
    own = {"type": "json_schema", "json_schema": {"name": "Tagged", "schema": schema}}
    with scripted(TWICE) as llm, pytest.raises(InvalidOutputError, match="uniqueItems"):
        llm.chat([ChatMessage("Tags, please.")], response_format=own)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_structured_llm_makes_sets() -> None:
    with scripted(TWICE) as llm:
        structured = llm.as_structured_llm(Tagged)
        assert structured.chat([ChatMessage("Tags, please.")]).raw == ONCE
        assert [*structured.stream_chat([ChatMessage("Tags, please.")])][-1].raw == ONCE


@every_stream
async def test_a_cancelled_stream_just_ends(ask: Ask) -> None:
    with scripted(JSON) as llm, cancel_scope() as scope:
        scope.cancel()
        assert await ask(llm) == []


@every_way
@pytest.mark.parametrize("mode", [PydanticProgramMode.FUNCTION, PydanticProgramMode.LLM])
async def test_another_program_mode_is_llama_indexs_own_way(ask: Ask, mode: PydanticProgramMode) -> None:
    reply, given = (SING if mode == PydanticProgramMode.FUNCTION else JSON), {"tool_choice": "none"}
    with scripted(reply, pydantic_program_mode=mode) as llm:
        assert (await ask(llm, llm_kwargs=given))[-1] == YESTERDAY
    assert given == {"tool_choice": "none"}
    assert PROMPT.output_parser is None


@every_stream
async def test_a_stream_by_tool_calls_grows_too(ask: Ask) -> None:
    """LlamaIndex's reader looks for calls where only `additional_kwargs` tells them."""
    with scripted(SING, pydantic_program_mode=PydanticProgramMode.FUNCTION) as llm:
        seen = await ask(llm)
    assert "Yest" in [getattr(partial, "title", None) for partial in seen]
    assert seen[-1] == YESTERDAY


@every_way
async def test_a_prediction_by_tool_calls_is_forced_and_knows_the_system_prompt(ask: Ask, recorder: Recorder) -> None:
    fields: dict[str, Any] = {"system_prompt": "Be brief.", "callback_manager": CallbackManager([recorder])}
    with scripted("Never!<to", pydantic_program_mode=PydanticProgramMode.FUNCTION, **fields) as llm:
        assert isinstance((await ask(llm))[-1], Song)
    messages = recorder.starts[0][1][EventPayload.MESSAGES]
    assert [message.content for message in messages] == ["Be brief.", "A song about the past, please."]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it calls json() of pydantic
async def test_a_structured_llm_answers_by_objects() -> None:
    with scripted(JSON) as llm:
        structured, messages = llm.as_structured_llm(Song), [ChatMessage("A song with {braces}, please.")]
        assert structured.chat(messages).raw == YESTERDAY
        assert (await structured.achat(messages)).raw == YESTERDAY
        assert [*structured.stream_chat(messages)][-1].raw == YESTERDAY
        assert [chunk async for chunk in await structured.astream_chat(messages)][-1].raw == YESTERDAY
        assert structured.complete("A song, please.").text == YESTERDAY.model_dump_json()


class Keeping(LlamaWorkerLLM):
    """Somebody who holds on to the stream beneath, as a traceback may."""

    def _structured_stream_call(self, *args: Any, **kwargs: Any) -> Any:
        kept.append(super()._structured_stream_call(*args, **kwargs))
        return kept[-1]

    def stream_chat(self, *args: Any, **kwargs: Any) -> Any:
        kept.append(super().stream_chat(*args, **kwargs))
        return kept[-1]


kept: list[Any] = []


def test_closing_a_stream_closes_what_is_beneath() -> None:
    kept.clear()
    with scripted(JSON) as llm:
        objects = Keeping(worker=llm.worker).stream_structured_predict(Song, PROMPT, topic="rain")
        next(objects)
        objects.close()
    assert [generator.gi_frame for generator in kept] == [None, None]


# -- the parts ----------------------------------------------------------------------------------------------------


def test_the_format_of_a_class_is_one_that_the_worker_takes() -> None:
    format = ResponseFormat.model_validate(keywords_for(Song, None)["response_format"])
    assert (format.type, format.json_schema) == ("json_schema", Song.model_json_schema())


class Described(Tagged):
    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:  # type: ignore[override]
        return {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}


class Renamed(Tagged):
    """Sets, at the top and below."""

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().model_json_schema(*args, **kwargs), "title": "Another"}


def test_a_class_demands_its_schema_but_for_its_sets() -> None:
    """A field may have the keyword's name; a class may describe itself."""
    schema = Tagged.model_json_schema()
    assert schema["properties"]["tags"].pop("uniqueItems")
    assert schema["properties"]["others"]["items"].pop("uniqueItems")
    assert demanded(Tagged) == schema
    assert demanded(Renamed) == {**schema, "title": "Another"}
    assert demanded(Described) == Described.model_json_schema()


def test_the_schema_is_told_once_and_the_messages_stay_as_they_were() -> None:
    messages = [ChatMessage("a", role="user"), ChatMessage("b", role="assistant"), ChatMessage("c", role="user")]
    told = with_schema(messages, Song)
    assert [len(message.blocks) for message in told] == [1, 1, 2]
    assert [len(message.blocks) for message in messages] == [1, 1, 1]
    assert [message.role.value for message in with_schema([], Song)] == ["user"]


def response(text: str, **raw: Any) -> ChatResponse:
    message = ChatMessage(blocks=[TextBlock(text=text)], role="assistant")
    return ChatResponse(message=message, delta=text, raw=raw or None)


@pytest.mark.parametrize("text", ["", "{", "secret", '{"title": "secret"}', '{"secret": 1}'])
def test_a_reply_that_is_no_object_is_an_error_without_its_text(text: str) -> None:
    with pytest.raises(UnusableReply, match="Song") as caught:
        whole(response(text, finish_reason="stop"), Song)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["", " ", "x", "[", "nul", "7", '"'])
def test_what_cannot_be_read_yet_says_nothing(text: str) -> None:
    def chunks() -> Iterator[ChatResponse]:
        yield response(text)

    assert list(Growing(Song).read(chunks())) in ([], [Song.model_construct()])  # type: ignore[arg-type]


def test_a_prompt_of_messages_may_be_predicted_from() -> None:
    prompt = ChatPromptTemplate([ChatMessage("Be brief.", role="system"), ChatMessage("A {what}.", role="user")])
    with scripted(JSON) as llm:
        assert llm.structured_predict(Song, prompt, what="song") == YESTERDAY  # type: ignore[arg-type]
