"""A model that knows nothing, at a temperature at which it cares for nothing: what it says is valid all the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_worker import LlamaWorker, ModelConfig
from llama_worker._constraint.validation import Validator
from tests.constraint.corpus import MODELS, UNSAID
from tests.constraint.walks import PROOF

pytestmark = pytest.mark.engine
_WILD = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 1500}


@pytest.fixture(scope="module")
def worker(tiny_llama: Path) -> Iterator[LlamaWorker]:
    config = ModelConfig(model=str(tiny_llama), n_ctx=8192, n_parallel=4, n_threads=1)
    with LlamaWorker(config) as opened:
        yield opened


@pytest.mark.parametrize("name", list(MODELS)[:: 1 if PROOF else 10])
def test_instances_from_random_weights_are_valid(worker: LlamaWorker, name: str) -> None:
    schema = MODELS[name].model_json_schema()
    wanted = {"type": "json_schema", "json_schema": schema}
    # A random walk need not come to an end, and is no answer then; but each of them does in one of these.
    walks = (worker.generate("Go on: ", response_format=wanted, seed=len(name) + i, **_WILD) for i in range(8))
    reply = next(reply for reply in walks if reply.finish_reason != "length")
    assert reply.finish_reason == "stop"
    assert Validator(json.dumps(schema), name).check(json.loads(reply.text)) is None
    if name not in UNSAID:
        MODELS[name].model_validate_json(reply.text)


def test_most_come_to_their_end(worker: LlamaWorker) -> None:
    names = list(MODELS)[::10]
    reasons = [
        worker.generate(
            "",
            response_format={"type": "json_schema", "json_schema": MODELS[name].model_json_schema()},
            seed=1,
            **_WILD,
        ).finish_reason
        for name in names
    ]
    assert reasons.count("stop") > len(names) * 0.7


@pytest.mark.parametrize("kind", [{}, {"type": "array"}, {"type": "object"}, {"type": "number"}], ids=str)
def test_calls_of_a_tool_that_says_nothing_of_a_value_are_valid(worker: LlamaWorker, kind: dict[str, object]) -> None:
    parameters = {"type": "object", "properties": {"p": kind}, "required": ["p"], "additionalProperties": kind}
    tool = {"name": "t", "parameters": parameters}
    ask = [{"role": "user", "content": "Go on."}]
    asked = {**_WILD, "max_tokens": 400, "tools": [tool], "tool_choice": "required"}
    replies = [worker.generate(ask, seed=seed, **asked) for seed in range(50 if PROOF else 5)]
    whole = [reply for reply in replies if reply.finish_reason != "length"]
    assert [reply.invalid_tool_calls for reply in whole] == [()] * len(whole)
    assert all(len(reply.tool_calls) == 1 for reply in whole)
    assert whole
