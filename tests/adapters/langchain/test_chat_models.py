"""ChatLlamaWorker over a fake engine: one answer whichever way it is asked for."""

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.exceptions import LangChainException
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField

from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings, LlamaWorkerLLM
from llama_worker import ConfigError, InvalidRequestError, LlamaWorker, WorkerConfig
from llama_worker.testing import fake_worker
from tests.adapters.langchain.test_calls import merged
from tests.worker.tools import QWEN, THINKER

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Tell me of the sea.")]
beta = pytest.mark.filterwarnings("ignore:.* is in beta")  # says langchain_core of what it is asked for here
PARAMS: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}


def chat(worker: LlamaWorker, **fields: Any) -> ChatLlamaWorker:
    return ChatLlamaWorker(worker=worker, **{**PARAMS, **fields})


def facts(message: AIMessage) -> dict[str, Any]:
    """What must not depend on how the answer was asked for. The cache, of course, is warmer each time."""
    usage: dict[str, Any] = dict(message.usage_metadata or {})
    usage.pop("input_token_details", None)
    return {"content": message.content, "usage": usage, "metadata": message.response_metadata}


class Tokens(BaseCallbackHandler):
    """Keeps what `on_llm_new_token` was called with."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.chunks: list[Any] = []

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        self.texts.append(token)
        self.chunks.append(chunk)


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"stop": ["e"]}, {"output_version": "v1"}], ids=str)
async def test_the_four_ways_to_ask_give_one_answer(worker: LlamaWorker, extra: dict[str, Any]) -> None:
    model = chat(worker, **extra)
    invoked = model.invoke(MESSAGES)
    streamed = merged(list(model.stream(MESSAGES)))
    assert invoked.text
    assert facts(await model.ainvoke(MESSAGES)) == facts(invoked)
    assert streamed.text == model.invoke(MESSAGES, stream=True).text == invoked.text
    assert facts(merged([chunk async for chunk in model.astream(MESSAGES)])) == facts(streamed)
    assert facts(streamed)["usage"] == facts(invoked)["usage"]
    assert streamed.response_metadata == invoked.response_metadata


def test_the_metadata_names_the_model_the_provider_and_the_reason(worker: LlamaWorker) -> None:
    assert chat(worker).invoke(MESSAGES).response_metadata == {
        "finish_reason": "length",
        "model_name": "fake://model",
        "model_provider": "llama_worker",
    }


def test_usage_is_exact_and_reported_once(worker: LlamaWorker) -> None:
    chunks = list(chat(worker).stream(MESSAGES))
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(usage) == 1
    roles = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}]
    assert usage[0]["input_tokens"] == worker.count_tokens(roles)
    assert usage[0]["output_tokens"] == 24
    assert usage[0]["total_tokens"] == usage[0]["input_tokens"] + 24


def test_a_repeated_prompt_is_read_from_the_cache(worker: LlamaWorker) -> None:
    model = chat(worker)
    model.invoke(MESSAGES)
    usage = model.invoke(MESSAGES).usage_metadata
    assert usage is not None
    assert usage["input_token_details"]["cache_read"] == usage["input_tokens"] - 1


def test_stream_usage_can_be_switched_off_and_on_again_by_a_call(worker: LlamaWorker) -> None:
    model = chat(worker, stream_usage=False)
    assert merged(list(model.stream(MESSAGES))).usage_metadata is None
    assert merged(list(model.stream(MESSAGES, stream_usage=True))).usage_metadata is not None


def test_usage_handlers_see_the_model(worker: LlamaWorker) -> None:
    handler = UsageMetadataCallbackHandler()
    chat(worker).invoke(MESSAGES, config={"callbacks": [handler]})
    assert handler.usage_metadata["fake://model"]["output_tokens"] == 24


async def test_each_token_is_announced_once_with_its_chunk(worker: LlamaWorker) -> None:
    for streaming in (False, True):
        tokens = Tokens()
        model = chat(worker, streaming=True) if streaming else chat(worker)
        if streaming:
            model.invoke(MESSAGES, config={"callbacks": [tokens]})
        else:
            async for _ in model.astream(MESSAGES, config={"callbacks": [tokens]}):
                pass
        assert "".join(tokens.texts) == model.invoke(MESSAGES).text
        assert all(chunk is not None for chunk in tokens.chunks)


def test_streaming_false_makes_stream_answer_in_one_piece(worker: LlamaWorker) -> None:
    assert len(list(chat(worker, streaming=False).stream(MESSAGES))) == 1


@beta
def test_the_v3_events_assemble_the_same_message(worker: LlamaWorker) -> None:
    stream = chat(worker).stream_events(MESSAGES, version="v3")
    assert stream.output.text == chat(worker).invoke(MESSAGES).text


def test_call_and_constructor_stops_are_merged(worker: LlamaWorker) -> None:
    text = chat(worker).invoke(MESSAGES).text
    first, second = text[5:8], text[10:13]
    model = chat(worker, stop=[second])
    assert model.invoke(MESSAGES).text == text[: text.index(second)]
    both = min(text.index(first), text.index(second))
    reply = model.invoke(MESSAGES, stop=[first])
    assert reply.text == text[:both]
    assert reply.response_metadata["finish_reason"] == "stop"
    assert merged(list(model.stream(MESSAGES, stop=[first]))).text == text[:both]


def test_a_call_overrides_any_sampling_parameter(worker: LlamaWorker) -> None:
    usage = chat(worker).invoke(MESSAGES, max_tokens=3).usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == 3


def test_a_bad_value_of_a_call_is_named(worker: LlamaWorker) -> None:
    with pytest.raises(InvalidRequestError, match="temperature=-7") as caught:
        chat(worker).invoke(MESSAGES, temperature=-7)
    assert isinstance(caught.value, LangChainException)


def test_empty_tools_are_no_tools(worker: LlamaWorker) -> None:
    assert chat(worker).bind(tools=[], response_format=None, tool_choice=None).invoke(MESSAGES).text


def test_a_choice_without_tools_is_refused_unless_it_is_only_the_default(worker: LlamaWorker) -> None:
    assert chat(worker, tool_choice="any").invoke(MESSAGES).text
    with pytest.raises(InvalidRequestError, match="there is no tool to call"):
        chat(worker).invoke(MESSAGES, tool_choice="any")


def test_logprobs_come_with_the_message_when_asked_for(worker: LlamaWorker) -> None:
    reply = chat(worker).invoke(MESSAGES, logprobs=2, max_tokens=4)
    content = reply.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == reply.text
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in content)


def test_tokens_are_those_of_the_model_and_its_template(worker: LlamaWorker) -> None:
    model = chat(worker)
    assert model.get_token_ids("abc") == [97, 98, 99]
    assert model.get_num_tokens("abc") == 3
    usage = model.invoke(MESSAGES).usage_metadata
    assert usage is not None
    assert model.get_num_tokens_from_messages(MESSAGES) == usage["input_tokens"]


def test_a_counter_of_the_users_own_comes_first(worker: LlamaWorker) -> None:
    model = chat(worker, custom_get_token_ids=lambda text: [1, 2])
    assert model.get_num_tokens("whatever") == 2
    assert model.get_num_tokens_from_messages(MESSAGES) == 4


def test_tools_are_counted_with_the_messages(worker: LlamaWorker) -> None:
    """As LangChain's middleware passes them: by position, as objects or as dicts, on an event loop or not."""
    tool = {"name": "forecast", "description": "Tells tomorrow's weather.", "parameters": {}}
    model = chat(worker, ignore_eos=None)
    more = model.get_num_tokens_from_messages(MESSAGES, [tool]) - model.get_num_tokens_from_messages(MESSAGES)
    assert more > len("forecast: Tells tomorrow's weather.")
    usage = model.bind_tools([tool]).invoke(MESSAGES, tool_choice="any", max_tokens=200).usage_metadata
    assert usage is not None
    assert usage["input_tokens"] == model.get_num_tokens_from_messages(MESSAGES, [tool])


def test_the_profile_tells_the_limits(worker: LlamaWorker) -> None:
    profile = ChatLlamaWorker(worker=worker, max_tokens=50).profile
    assert profile is not None
    assert (profile["max_input_tokens"], profile["max_output_tokens"]) == (4096, 50)
    assert profile["text_inputs"]
    assert not profile["reasoning_output"]


@pytest.mark.parametrize("skill", ["tool_calling", "tool_choice", "tool_call_streaming", "structured_output"])
def test_the_profile_tells_the_skills(worker: LlamaWorker, skill: str) -> None:
    """An agent that is left to choose takes the way that its profile offers."""
    assert chat(worker).profile[skill] is True  # type: ignore[index, literal-required]


SPEAKS_OF_THOUGHTS = "{# no reasoning_content #}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<b>"


@pytest.mark.parametrize(("template", "thinks"), [(THINKER, True), (QWEN, True), (SPEAKS_OF_THOUGHTS, False)])
def test_the_profile_tells_whether_the_template_writes_thoughts(template: str, thinks: bool, tmp_path: Path) -> None:
    """Not whether it speaks of them; and wherever it stands."""
    path = tmp_path / "template.jinja"
    path.write_text(template, encoding="utf-8")
    for given in (template, str(path)):
        profile = ChatLlamaWorker(model="demo://smollm2-135m-instruct", chat_template=given).profile
        assert profile is not None
        assert profile["reasoning_output"] is thinks


def test_a_worker_given_twice_over_must_agree(worker: LlamaWorker) -> None:
    assert ChatLlamaWorker(worker=worker, n_ctx=4096).worker is worker
    with pytest.raises(ConfigError, match="n_ctx=99"):
        ChatLlamaWorker(worker=worker, n_ctx=99)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda model: model.model_copy()], ids=str)
def test_copies_share_the_live_worker(worker: LlamaWorker, twin: Any) -> None:
    model = chat(worker)
    model.invoke(MESSAGES)  # with whatever was cached on the way
    assert twin(model).worker is worker
    assert twin(model).invoke(MESSAGES).text == model.invoke(MESSAGES).text


def test_configurable_fields_share_the_live_worker(worker: LlamaWorker) -> None:
    model = chat(worker).configurable_fields(max_tokens=ConfigurableField(id="n"))
    configured = model.with_config(configurable={"n": 5})
    assert configured.invoke(MESSAGES).usage_metadata["output_tokens"] == 5  # type: ignore[index]
    assert len(list(configured.stream(MESSAGES))) > 2
    assert worker.status().epoch == 1


def test_a_model_by_name_survives_pickling_without_being_opened() -> None:
    model = ChatLlamaWorker(model="/nowhere.gguf", temperature=0.5, stop=["x"])
    twin = pickle.loads(pickle.dumps(model))
    assert twin == model
    assert twin._identifying_params == model._identifying_params


@beta
def test_a_model_with_a_worker_is_saved_with_that_workers_settings(worker: LlamaWorker) -> None:
    model = chat(worker, seed=4)
    twin = load(dumpd(model), valid_namespaces=["langchain_llama_worker"], allowed_objects=[ChatLlamaWorker])
    assert twin.worker is None
    assert twin._identifying_params == model._identifying_params


def test_batch_runs_side_by_side_and_keeps_the_order(worker: LlamaWorker) -> None:
    prompts = [f"number {n}" for n in range(6)]
    model = chat(worker)
    assert [r.text for r in model.batch(prompts)] == [model.invoke(prompt).text for prompt in prompts]


async def test_abatch_runs_side_by_side_and_keeps_the_order(worker: LlamaWorker) -> None:
    prompts = [f"number {n}" for n in range(6)]
    model = chat(worker)
    assert [r.text for r in await model.abatch(prompts)] == [(await model.ainvoke(p)).text for p in prompts]


def test_one_object_serves_several_event_loops(worker: LlamaWorker) -> None:
    model = chat(worker)

    async def ask() -> str:
        whole = merged([chunk async for chunk in model.astream(MESSAGES)])
        return whole.text + (await model.ainvoke(MESSAGES)).text

    answers = [asyncio.run(ask()) for _ in range(3)]
    assert answers == [answers[0]] * 3
    assert answers[0] == model.invoke(MESSAGES).text * 2


def test_no_async_method_borrows_a_thread(worker: LlamaWorker) -> None:
    """A default executor would be shared with everybody else and could not be cancelled."""
    model, llm, embedder = chat(worker), LlamaWorkerLLM(worker=worker, **PARAMS), LlamaWorkerEmbeddings(worker=worker)

    async def ask_everything() -> None:
        assert (await model.ainvoke(MESSAGES)).text
        assert [chunk async for chunk in model.astream(MESSAGES)]
        assert await llm.abatch(["one", "two"])
        assert [piece async for piece in llm.astream("one")]
        assert await embedder.aembed_documents(["one", "two"])

    with asyncio.Runner(loop_factory=LoopWithoutExecutor) as runner:
        runner.run(ask_everything())


class LoopWithoutExecutor(asyncio.SelectorEventLoop):
    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        raise AssertionError(f"{func} was to run in an executor")


def test_a_cached_answer_is_not_generated_again(worker: LlamaWorker) -> None:
    cache = InMemoryCache()
    first = chat(worker, cache=cache).invoke(MESSAGES)
    steps = worker.status().steps
    assert chat(worker, cache=cache).invoke(MESSAGES).text == first.text
    assert worker.status().steps == steps
    chat(worker, cache=cache, seed=3).invoke(MESSAGES)
    assert worker.status().steps > steps


def test_it_is_a_link_of_a_chain(worker: LlamaWorker) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "Tell me of {x}.")]) | chat(worker) | StrOutputParser()
    assert "".join(chain.stream({"x": "rain"})) == chain.invoke({"x": "rain"}) != ""


def test_a_full_queue_is_tried_again_and_then_reported() -> None:
    with fake_worker("reply", worker_config=WorkerConfig(on_full="reject", queue_size=1)) as worker:
        model = ChatLlamaWorker(worker=worker, max_retries=8)
        assert [r.text for r in model.batch(["a"] * 3)] == ["reply"] * 3
