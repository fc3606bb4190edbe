"""LlamaWorkerLLM over a fake engine: prompts side by side, everything reported."""

import asyncio
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import GenerationChunk, LLMResult

from langchain_llama_worker import LlamaWorkerLLM
from llama_worker import ContextOverflowError, LlamaWorker, WorkerConfig
from llama_worker.testing import FakeEngine, fake_loader, fake_worker
from tests.adapters.langchain.conftest import ENDLESS, Stage

PROMPTS = [f"Once upon a time {n}" for n in range(10)]
PARAMS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def llm(worker: LlamaWorker, **fields: Any) -> LlamaWorkerLLM:
    return LlamaWorkerLLM(worker=worker, **{**PARAMS, **fields})


class Tokens(BaseCallbackHandler):
    """Keeps the chunks that `on_llm_new_token` was called with, and the final result."""

    def __init__(self) -> None:
        self.chunks: list[GenerationChunk] = []
        self.result: LLMResult | None = None

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        self.chunks.append(chunk)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.result = response


async def test_every_way_to_ask_gives_the_same_texts_in_order(worker: LlamaWorker) -> None:
    model = llm(worker)
    one_by_one = [model.invoke(prompt) for prompt in PROMPTS]
    assert len(set(one_by_one)) == len(PROMPTS)
    assert model.batch(PROMPTS) == one_by_one
    assert await model.abatch(PROMPTS) == one_by_one
    assert ["".join(model.stream(prompt)) for prompt in PROMPTS] == one_by_one
    assert ["".join([piece async for piece in model.astream(prompt)]) for prompt in PROMPTS] == one_by_one


def test_a_prompt_is_not_templated(worker: LlamaWorker) -> None:
    """One token for each byte, and the model's own beginning of text."""
    result = llm(worker).generate(["abc"])
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["usage_metadata"]["input_tokens"] in (3, 4)


async def test_each_generation_says_how_it_ended_and_what_it_cost(worker: LlamaWorker) -> None:
    for result in (llm(worker).generate(PROMPTS[:2]), await llm(worker).agenerate(PROMPTS[:2])):
        infos = [generations[0].generation_info or {} for generations in result.generations]
        assert [info["finish_reason"] for info in infos] == ["length", "length"]
        assert [info["usage_metadata"]["output_tokens"] for info in infos] == [12, 12]
        assert result.llm_output is not None
        assert result.llm_output["model_name"] == "fake://model"
        total = sum(info["usage_metadata"]["total_tokens"] for info in infos)
        assert result.llm_output["token_usage"]["total_tokens"] == total


async def test_a_streams_chunks_are_announced_and_add_up(worker: LlamaWorker) -> None:
    whole = llm(worker).generate([PROMPTS[0]]).generations[0][0]
    for asynchronous in (False, True):
        tokens = Tokens()
        config: Any = {"callbacks": [tokens]}
        if asynchronous:
            texts = [piece async for piece in llm(worker).astream(PROMPTS[0], config=config)]
        else:
            texts = list(llm(worker).stream(PROMPTS[0], config=config))
        assert [chunk.text for chunk in tokens.chunks] == texts
        assert tokens.result is not None
        end = tokens.result.generations[0][0]
        assert end.text == whole.text
        assert (end.generation_info or {})["finish_reason"] == "length"
        assert (end.generation_info or {})["usage_metadata"]["output_tokens"] == 12


@pytest.mark.parametrize("asynchronous", [False, True])
def test_prompts_are_generated_side_by_side(asynchronous: bool) -> None:
    """Four prompts of 200 tokens need about as many decodes as one, not 800."""
    engines: list[FakeEngine] = []
    with fake_worker(loader=fake_loader(seen=engines.append), n_parallel=4) as worker:
        model = llm(worker, max_tokens=200)
        asyncio.run(model.agenerate(PROMPTS[:4])) if asynchronous else model.generate(PROMPTS[:4])
    assert engines[0].calls.count("decode") < 500


@pytest.mark.parametrize("asynchronous", [False, True])
def test_when_one_prompt_fails_the_others_are_cancelled(stage: Stage, asynchronous: bool) -> None:
    prompts = ["endless", "x" * 200_000, "endless too"]
    model = llm(stage.worker, **ENDLESS)
    with pytest.raises(ContextOverflowError):
        asyncio.run(model.agenerate(prompts)) if asynchronous else model.generate(prompts)
    assert stage.is_free()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_more_prompts_than_the_queue_holds_wait_their_turn(asynchronous: bool) -> None:
    with fake_worker(worker_config=WorkerConfig(queue_size=1), n_parallel=1) as worker:
        model = llm(worker)
        answers = asyncio.run(model.abatch(PROMPTS)) if asynchronous else model.batch(PROMPTS)
        assert answers == [model.invoke(prompt) for prompt in PROMPTS]


def test_no_prompts_is_no_work(worker: LlamaWorker) -> None:
    assert llm(worker).batch([]) == []


def test_call_and_constructor_stops_are_merged(worker: LlamaWorker) -> None:
    text = llm(worker).invoke(PROMPTS[0])
    assert llm(worker, stop=["@"]).invoke(PROMPTS[0], stop=[text[6]]) == text[: text.index(text[6])]


def test_tokens_are_those_of_the_model(worker: LlamaWorker) -> None:
    assert llm(worker).get_token_ids("abc") == [97, 98, 99]
    assert llm(worker).get_num_tokens("abc") == 3
    assert llm(worker, custom_get_token_ids=lambda text: [1]).get_num_tokens("abc") == 1


def test_tracing_knows_it_as_a_completion_model(worker: LlamaWorker) -> None:
    params = llm(worker)._get_ls_params(stop=["x"])
    assert params["ls_model_type"] == "llm"
    assert params["ls_provider"] == "llama_worker"
    assert params["ls_model_name"] == "fake://model"
    assert params["ls_stop"] == ["x"]
