"""Tools, from LlamaIndex's own methods to the worker and back: what may be called, what was, and what never is."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_index.core.agent.react import ReActChatFormatter, ReActOutputParser
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ThinkingBlock, ToolCallBlock
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from llama_index.llms.llama_worker import LlamaWorkerLLM, UnusableReply
from pydantic import BaseModel

from llama_worker import InvalidRequestError, InvalidToolCall
from llama_worker.testing import fake_worker

from .conftest import HELLO
from .scripts import SING, SONG, SONG_TOOL, TEMPLATE, Song, call, generate_song, scripted, thought

Ask = Callable[..., Awaitable[list[ChatResponse]]]


async def chat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[ChatResponse]:
    return [llm.chat_with_tools(**kwargs)]


async def achat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[ChatResponse]:
    return [await llm.achat_with_tools(**kwargs)]


async def stream_chat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[ChatResponse]:
    return list(llm.stream_chat_with_tools(**kwargs))


async def astream_chat(llm: LlamaWorkerLLM, **kwargs: Any) -> list[ChatResponse]:
    return [response async for response in await llm.astream_chat_with_tools(**kwargs)]


every_way = pytest.mark.parametrize("ask", [chat, achat, stream_chat, astream_chat])
SONGS: dict[str, Any] = {"tools": [SONG_TOOL], "user_msg": "A song, please."}


def called(llm: LlamaWorkerLLM, response: ChatResponse) -> list[tuple[str, dict[str, Any]]]:
    calls = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return [(selection.tool_name, selection.tool_kwargs) for selection in calls]


@every_way
async def test_a_model_may_call(ask: Ask) -> None:
    with scripted(thought("A song.", f"Of course.\n{SING}")) as llm:
        last = (await ask(llm, **SONGS))[-1]
        assert called(llm, last) == [("generate_song", SONG)]
        assert [block.block_type for block in last.message.blocks] == ["thinking", "text", "tool_call"]
        assert str(last.message.content).strip() == "Of course."
        assert last.raw["finish_reason"] == "tool_calls"
        assert 0 < last.raw["usage"]["reasoning_tokens"] < last.raw["usage"]["completion_tokens"]
        assert Song(**called(llm, last)[0][1]) == Song(title="Yesterday", year=1965)


@every_way
async def test_a_model_may_answer_instead(ask: Ask) -> None:
    with scripted("I cannot sing.") as llm:
        last = (await ask(llm, **SONGS))[-1]
        assert (called(llm, last), last.message.content) == ([], "I cannot sing.")
        assert last.raw["finish_reason"] == "stop"


@every_way
@pytest.mark.parametrize("forced", [{"tool_required": True}, {"tool_choice": "any"}, {"tool_choice": "generate_song"}])
async def test_a_model_must_call(ask: Ask, forced: dict[str, Any]) -> None:
    """Its own words are none that the grammar allows, and its call comes to an end."""
    with scripted("Never!<to") as llm:
        [(name, kwargs)] = called(llm, (await ask(llm, **SONGS, **forced))[-1])
        assert name == "generate_song"
        assert Song(**kwargs)


@every_way
async def test_the_tool_that_is_named_is_called(ask: Ask) -> None:
    other = FunctionTool.from_defaults(lambda: "", name="other", description="Something else.")
    with scripted(SING) as llm:
        last = (await ask(llm, tools=[SONG_TOOL, other], user_msg="x", tool_choice="other"))[-1]
        assert called(llm, last) == [("other", {})]


@every_way
async def test_a_model_that_must_not_call_does_not(ask: Ask) -> None:
    with scripted(SING) as llm:
        last = (await ask(llm, **SONGS, tool_choice="none"))[-1]
        assert called(llm, last) == []
        assert not any(isinstance(block, ToolCallBlock) for block in last.message.blocks)


@every_way
async def test_one_call_or_many_as_allowed(ask: Ask) -> None:
    with scripted(f"{SING}\n{SING}") as llm:
        assert len(called(llm, (await ask(llm, **SONGS))[-1])) == 1
        last = (await ask(llm, **SONGS, allow_parallel_tool_calls=True))[-1]
        assert called(llm, last) == [("generate_song", SONG)] * 2
        ids = [selection.tool_id for selection in llm.get_tool_calls_from_response(last)]
        assert len(set(ids)) == 2


@every_way
async def test_an_undeclared_tool_is_never_called(ask: Ask) -> None:
    with scripted(call("delete_everything")) as llm:
        last = (await ask(llm, **SONGS))[-1]
        assert {name for name, _ in called(llm, last)} <= {"generate_song"}


@every_way
async def test_arguments_are_what_the_schema_wants(ask: Ask) -> None:
    with scripted(call("generate_song", title=7, year="soon")) as llm:
        [(name, kwargs)] = called(llm, (await ask(llm, **SONGS, tool_required=True))[-1])
        assert (name, bool(Song(**kwargs))) == ("generate_song", True)


@every_way
async def test_a_tool_may_be_a_function(ask: Ask) -> None:
    """An agent takes it for one."""
    with scripted(SING) as llm:
        assert called(llm, (await ask(llm, tools=[generate_song], user_msg="x"))[-1]) == [("generate_song", SONG)]
        chat = llm.chat([ChatMessage("x")], tools=[generate_song])
        assert called(llm, chat) == [("generate_song", SONG)]


class Tags(BaseModel):
    tags: set[str]


@every_way
async def test_what_is_told_twice_is_in_a_set_once(ask: Ask) -> None:
    tool = FunctionTool.from_defaults(lambda tags: str(len(tags)), name="tag", description="", fn_schema=Tags)
    with scripted(call("tag", tags=["old", "old"])) as llm:
        last = (await ask(llm, tools=[tool], user_msg="x"))[-1]
        [(name, kwargs)] = called(llm, last)
        assert (name, Tags(**kwargs)) == ("tag", Tags(tags={"old"}))


@pytest.mark.parametrize("written", ['{"title": "Yest', "{", "", "nothing"])
def test_a_conversation_goes_on_after_a_call_that_another_cut_off(written: str) -> None:
    cut = ToolCallBlock(tool_call_id="1", tool_name="generate_song", tool_kwargs=written)
    history = [ChatMessage("A song."), ChatMessage(blocks=[cut], role="assistant"), ChatMessage("Well?")]
    with scripted("I was cut off.") as llm:
        assert llm.chat(history).message.content == "I was cut off."
        assert llm.chat_with_tools([SONG_TOOL], chat_history=history).message.content == "I was cut off."
    assert cut.tool_kwargs == written


@every_way
async def test_a_tool_is_called_by_its_own_name(ask: Ask) -> None:
    """LlamaIndex would write my_tool, and then not find it."""
    tool = FunctionTool.from_defaults(generate_song, name="my.tool", fn_schema=Song)
    with scripted(call("my.tool", **SONG)) as llm:
        last = (await ask(llm, tools=[tool], user_msg="x"))[-1]
        assert called(llm, last) == [("my.tool", SONG)]


@every_way
async def test_a_call_that_is_cut_off_is_none(ask: Ask) -> None:
    with scripted(f"Ok. {SING}", max_tokens=len(f"Ok. {SING}") - 20) as llm:
        responses = await ask(llm, **SONGS)
        assert not any(isinstance(block, ToolCallBlock) for r in responses for block in r.message.blocks)
        last = responses[-1]
        assert called(llm, last) == []
        assert "tool_calls" not in last.message.additional_kwargs
        [invalid] = last.raw["invalid_tool_calls"]
        assert InvalidToolCall(**invalid).name == "generate_song"
        assert last.raw["finish_reason"] == "length"
        with pytest.raises(UnusableReply, match="max_tokens"):
            llm.get_tool_calls_from_response(last)


@pytest.mark.parametrize("ask", [stream_chat, astream_chat])
async def test_a_stream_tells_of_a_call_while_it_is_written(ask: Ask) -> None:
    with scripted(thought("A song.", SING)) as llm:
        chunks = await ask(llm, **SONGS)
        told = [called(llm, chunk) for chunk in chunks]
        first = next(i for i, calls in enumerate(told) if calls)
        assert told[first] == [("generate_song", {})]
        assert [("generate_song", {"title": "Yest"})] in told
        assert all(calls for calls in told[first:])
        assert all(chunk.delta is not None for chunk in chunks)
        thoughts = [chunk.additional_kwargs.get("thinking_delta", "") for chunk in chunks]
        assert "".join(thoughts) == "A song."
        assert len([piece for piece in thoughts if piece]) > 1


@every_way
async def test_a_conversation_with_calls_goes_on(ask: Ask) -> None:
    """The reply goes back as it came, with the results of its calls."""
    with scripted(thought("A song.", SING), "It is sung.") as llm:
        first = (await ask(llm, **SONGS))[-1]
        [selection] = llm.get_tool_calls_from_response(first)
        result = ChatMessage("done", role="tool", additional_kwargs={"tool_call_id": selection.tool_id})
        history = [ChatMessage("A song, please.", role="user"), first.message, result]
        before = [message.model_dump_json() for message in history]
        last = (await ask(llm, tools=[SONG_TOOL], chat_history=history))[-1]
        assert last.message.content == "It is sung."
        assert [message.model_dump_json() for message in history] == before


def test_a_conversation_comes_to_the_model_as_its_template_writes_it() -> None:
    calls = [ToolCallBlock(tool_call_id="1", tool_name="generate_song", tool_kwargs=SONG)]
    answer = ChatMessage(blocks=[ThinkingBlock(content="A song."), *calls], role="assistant")
    result = ChatMessage("done", role="tool", additional_kwargs={"tool_call_id": "1"})
    written = [
        "<|im_start|>user\nA song, please.<|im_end|>\n",
        f"<|im_start|>assistant\n{thought('A song.')}\n{SING}<|im_end|>\n",
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ]
    with scripted("") as llm:
        usage = llm.chat([ChatMessage("A song, please."), answer, result]).raw["usage"]
        raw = llm._connect()._view().prompt_tokens("".join(written))
        assert usage["prompt_tokens"] == len(raw) - 1  # the BOS of a raw prompt


@every_way
async def test_keywords_of_a_call_with_tools_are_honoured(ask: Ask) -> None:
    with scripted(thought("A long thought.", "Yes, of course.")) as llm:
        last = (await ask(llm, **SONGS, max_tokens=3, stop=["zz"]))[-1]
        assert last.raw["usage"]["completion_tokens"] == 3
        with pytest.raises(InvalidRequestError, match="temprature"):
            await ask(llm, **SONGS, temprature=0)


@every_way
async def test_tools_need_a_template(ask: Ask) -> None:
    with scripted("x", messages_to_prompt=lambda messages: "abc") as llm:
        with pytest.raises(InvalidRequestError, match="template"):
            await ask(llm, **SONGS)
        assert (await ask(llm, tools=[], user_msg="x"))[-1].message.content == "x"


@every_way
async def test_a_template_without_tools_gets_them_described(ask: Ask) -> None:
    with fake_worker("{", n_ctx=40_000) as worker:
        llm = LlamaWorkerLLM(worker=worker, max_tokens=2_000)
        [(name, kwargs)] = called(llm, (await ask(llm, **SONGS, tool_required=True))[-1])
        assert name == "generate_song"
        assert Song(**kwargs)


def test_thinking_can_be_asked_for_and_limited() -> None:
    with scripted(thought("A very long thought.", "Yes.")) as llm:
        free = llm.chat(HELLO).raw["usage"]
        assert llm.chat(HELLO, enable_thinking=False).raw["usage"]["prompt_tokens"] > free["prompt_tokens"]
        short = llm.chat(HELLO, reasoning_budget=6)
        assert 0 < short.raw["usage"]["reasoning_tokens"] < free["reasoning_tokens"]
        llm.enable_thinking = False
        assert llm.chat(HELLO).raw["usage"]["prompt_tokens"] > free["prompt_tokens"]


def test_a_limit_of_thought_is_a_setting() -> None:
    with scripted(thought("A very long thought.", "Yes."), reasoning_budget=6) as llm:
        response = llm.chat(HELLO)
        [thinking] = [block for block in response.message.blocks if isinstance(block, ThinkingBlock)]
        assert len(thinking.content or "") < len("A very long thought.")
        assert thinking.num_tokens == response.raw["usage"]["reasoning_tokens"]


def test_templates_variables_and_sessions_are_keywords() -> None:
    with fake_worker("x", chat_template=TEMPLATE + "{{ mood }}") as worker:
        llm = LlamaWorkerLLM(worker=worker)
        plain = llm.chat(HELLO).raw["usage"]["prompt_tokens"]
        moody = llm.chat(HELLO, template_variables={"mood": "happy"}, session="a", priority=1)
        assert moody.raw["usage"]["prompt_tokens"] == plain + len("happy")


# -- predict_and_call ---------------------------------------------------------------------------------------------


async def predict(llm: LlamaWorkerLLM, *args: Any, **kwargs: Any) -> Any:
    return llm.predict_and_call(*args, **kwargs)


async def apredict(llm: LlamaWorkerLLM, *args: Any, **kwargs: Any) -> Any:
    return await llm.apredict_and_call(*args, **kwargs)


both = pytest.mark.parametrize("run", [predict, apredict])


@both
async def test_a_prediction_is_called(run: Callable[..., Awaitable[Any]]) -> None:
    with scripted(SING) as llm:
        answer = await run(llm, [SONG_TOOL], "A song, please.")
        assert answer.response == "Yesterday (1965)"
        assert [source.tool_name for source in answer.sources] == ["generate_song"]


@both
async def test_a_function_is_called(run: Callable[..., Awaitable[Any]]) -> None:
    with scripted(SING) as llm:
        assert (await run(llm, [generate_song], "A song, please.")).response == "Yesterday (1965)"


@both
async def test_predictions_may_be_many(run: Callable[..., Awaitable[Any]]) -> None:
    with scripted(f"{SING}\n{SING}") as llm:
        answer = await run(llm, [SONG_TOOL], "Songs, please.", allow_parallel_tool_calls=True)
        assert answer.response == "Yesterday (1965)\n\nYesterday (1965)"
        assert len((await run(llm, [SONG_TOOL], "A song, please.")).sources) == 1


@both
async def test_a_tool_that_fails_may_fail_the_prediction(run: Callable[..., Awaitable[Any]]) -> None:
    def fail(title: str, year: int) -> str:
        raise RuntimeError("no voice")

    tool = FunctionTool.from_defaults(fail, name="generate_song", fn_schema=Song)
    with scripted(SING) as llm:
        assert (await run(llm, [tool], "x")).sources[0].is_error
        with pytest.raises(ValueError, match="no voice"):
            await run(llm, [tool], "x", error_on_tool_error=True)


@both
async def test_a_prediction_without_a_call_may_be_an_answer(run: Callable[..., Awaitable[Any]]) -> None:
    with scripted("No.") as llm:
        assert (await run(llm, [SONG_TOOL], "x", error_on_no_tool_call=False)).response == "No."
        with pytest.raises(UnusableReply):
            await run(llm, [SONG_TOOL], "x")


@both
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_model_that_is_said_to_call_no_tools_predicts_by_text(run: Callable[..., Awaitable[Any]]) -> None:
    action = 'Thought: I sing.\nAction: generate_song\nAction Input: {"title": "Yesterday", "year": 1965}'
    with scripted(action, is_function_calling_model=False) as llm:
        assert not llm.metadata.is_function_calling_model
        parts: dict[str, Any] = {"react_chat_formatter": ReActChatFormatter(), "output_parser": ReActOutputParser()}
        memory = ChatMemoryBuffer.from_defaults(llm=llm)
        assert (await run(llm, [SONG_TOOL], "x", memory=memory, **parts)).response == "Yesterday (1965)"
