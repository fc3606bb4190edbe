"""Arguments that no type checker would let through: a typed error that names them, and a worker that serves on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_worker import (
    ConfigError,
    LlamaWorker,
    ModelConfig,
    WorkerClosed,
    WorkerConfig,
    WorkerDied,
    get_handle,
    get_worker,
    inspect_model,
    plan_memory,
)
from llama_worker._errors import FieldError
from llama_worker.testing import FakeEngine, fake_loader, fake_worker


@pytest.fixture(params=["fake", pytest.param("llama", marks=pytest.mark.engine)])
def worker(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "fake":
        with fake_worker("answer") as worker:
            yield worker
        return
    path: Path = request.getfixturevalue("tiny_llama")
    with LlamaWorker(ModelConfig(model=str(path), n_ctx=1024, n_threads=1)) as worker:
        yield worker


CALLS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a text for the time to drain": ("timeout", lambda w: w.reload(n_ctx=512, timeout="5")),
    "no number for it": ("timeout", lambda w: w.reload(n_ctx=512, timeout=float("nan"))),
    "less than none": ("timeout", lambda w: w.reload(n_ctx=512, timeout=-1)),
    "more than a clock counts": ("timeout", lambda w: w.reload(n_ctx=512, timeout=10**400)),
    "the same from a task": ("timeout", lambda w: asyncio.run(w.areload(n_ctx=512, timeout="5"))),
    "progress that is no function": ("progress", lambda w: w.reload(n_ctx=512, progress=5)),
    "a reload to a number": ("config", lambda w: w.reload(5)),
    "a reload to a mapping": ("config", lambda w: w.reload({"model": "x"})),
    "a reload to another kind of configuration": ("config", lambda w: w.reload(WorkerConfig())),
    "an adapter whose name is no text": ("name", lambda w: w.remove_lora([])),
    "an adapter in no file": ("lora_paths", lambda w: w.add_lora("a", 5)),
    "a batch with a text for a number": ("max_concurrency", lambda w: w.infer_batch(["a"], max_concurrency="1")),
    "no text to tokenize": ("text", lambda w: w.tokenize(None)),
    "no list of ids": ("ids", lambda w: w.detokenize(None)),
    "a text for ids": ("ids", lambda w: w.detokenize("ab")),
    "ids that are no integers": ("ids", lambda w: w.detokenize([1.5])),
    "a socket that is no path": ("path", lambda w: w.export(5)),
}


@pytest.mark.parametrize(("field", "call"), CALLS.values(), ids=CALLS.keys())
def test_it_is_named_and_the_worker_serves_on(worker: Any, field: str, call: Callable[[Any], object]):
    with pytest.raises(FieldError) as refused:
        call(worker)
    assert refused.value.field == field
    assert worker.generate("hello", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    assert (worker.status().state, worker.status().epoch) == ("ready", 1)


def test_ids_are_read_once(worker: Any):
    """So any iterable of them will do."""
    ids = worker.tokenize("hello world")
    assert worker.detokenize(iter(ids)) == worker.detokenize(token for token in ids) == worker.detokenize(ids) != ""


OPENED: dict[str, Callable[[Any], object]] = {
    "a worker": LlamaWorker,
    "a worker in the background": LlamaWorker.begin,
    "a shared worker": get_worker,
    "a handle": get_handle,
    "a plan": plan_memory,
    "a header": inspect_model,
}


@pytest.mark.parametrize("given", [None, 5, b"model.gguf", {"model": "x"}], ids=["None", "number", "bytes", "mapping"])
@pytest.mark.parametrize("opened", OPENED.values(), ids=OPENED.keys())
def test_what_names_no_model_is_refused_before_anything_begins(opened: Callable[[Any], object], given: object):
    with pytest.raises(ConfigError) as refused:
        opened(given)
    assert refused.value.field in ("config", "model")


@pytest.mark.parametrize("opened", [LlamaWorker, LlamaWorker.begin, get_worker, get_handle])
def test_how_a_worker_behaves_is_a_worker_config(opened: Callable[[Any, Any], object]):
    with pytest.raises(ConfigError) as refused:
        opened("fake://model", {"queue_size": 3})
    assert refused.value.field == "worker_config"


@pytest.mark.engine
def test_a_path_object_names_a_model_too(tiny_llama: Path):
    assert ModelConfig(model=tiny_llama) == ModelConfig(model=str(tiny_llama))  # type: ignore[arg-type]
    assert inspect_model(tiny_llama) == inspect_model(str(tiny_llama))  # type: ignore[arg-type]


def test_a_worker_that_is_closed_exports_and_changes_nothing():
    worker = fake_worker("answer")
    worker.close()
    with pytest.raises(WorkerClosed):
        worker.export()
    with pytest.raises(WorkerClosed):
        worker.reconfigure(queue_size=3)


async def test_a_task_hears_what_a_dead_worker_died_of():
    engines: list[FakeEngine] = []
    worker = fake_worker(loader=fake_loader("answer", seen=engines.append))
    engines[0].decode = None  # type: ignore[method-assign, assignment]
    with pytest.raises(WorkerDied):
        worker.generate("hello")
    worker._thread.join()
    for asked in (worker.areload(n_ctx=512), worker.aremove_lora("a")):
        with pytest.raises(WorkerDied) as heard:
            await asked
        assert isinstance(heard.value.__cause__, TypeError)
