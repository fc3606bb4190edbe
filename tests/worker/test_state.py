"""export_state and import_state: what a worker is, as JSON, and the same worker again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama_worker import ConfigError, LlamaWorker, ModelConfig, WorkerConfig
from llama_worker._requests import EmbedRequest
from llama_worker.testing import Gate, fake_loader, fake_worker
from tests.worker.bench import Bench
from tests.worker.waiting import in_thread, wait_until

CONFIG = ModelConfig(model="fake://model", n_ctx=1024, tensor_split=(0.5, 0.5), chat_template="{{ messages }}")
BEHAVIOUR = WorkerConfig(queue_size=3, on_full="reject", step_budget_ms=50, stall_timeout=9)


def exported(**changes: Any) -> dict[str, Any]:
    with LlamaWorker(CONFIG, BEHAVIOUR, loader=fake_loader()) as worker:
        state = json.loads(json.dumps(worker.export_state()))
    return {**state, **changes}


def test_a_worker_from_a_state_is_the_same_again():
    state = exported()
    with LlamaWorker.import_state(state, loader=fake_loader("hello")) as worker:
        assert worker.config == CONFIG
        assert worker.generate("x").text == "hello"
        again = worker.export_state()
    assert (again["model"], again["worker"]) == (state["model"], state["worker"])


def test_the_state_is_that_of_the_model_that_serves_now():
    with LlamaWorker(CONFIG, BEHAVIOUR, loader=fake_loader()) as worker:
        worker.reload(n_ctx=2048)
        assert worker.export_state()["model"]["n_ctx"] == 2048
        assert worker.export_state()["status"]["epoch"] == 2


def test_the_state_is_that_of_the_worker_as_it_behaves_now():
    with LlamaWorker(CONFIG, BEHAVIOUR, loader=fake_loader("hello")) as worker:
        worker.reconfigure(queue_size=5)
        worker.generate("x")
        state = worker.export_state()
        assert state["worker"]["queue_size"] == 5
        assert state["metrics"]["finished"] == {"stop": 1}
        assert (state["version"], state["waiting"]) == (1, [])


def test_of_those_who_wait_it_says_how_long_for_whom_and_how_much():
    gate = Gate()
    behaviour = WorkerConfig(queue_size=1)
    worker = fake_worker(loader=fake_loader(gate=gate), worker_config=behaviour, n_parallel=1)
    with worker:
        gate.shut()
        streams = [worker.stream("held")]
        gate.wait_reached()
        streams.append(worker.stream("a secret", session="in the scheduler"))
        wait_until(lambda: worker.export_state()["waiting"])
        joins = [in_thread(lambda: worker.stream("a secret", session="in the channel", priority=1))]
        wait_until(lambda: worker.status().queued)
        joins.append(in_thread(lambda: worker.embed(["a secret", "another"], priority=-1)))
        wait_until(lambda: worker.status().callers_waiting)
        state = worker.export_state()
        gate.open()
        for stream in streams:
            stream.close()
        joins[0]().close()
        assert len(joins[1]()) == 2
    assert "secret" not in json.dumps(state)
    rows = {
        (row["kind"], row["session"], row["priority"], row["prompt_tokens"], row["texts"]) for row in state["waiting"]
    }
    assert ("generate", "in the channel", 1, 9, 1) in rows
    assert ("embed", None, -1, 17, 2) in rows
    assert all(row["age"] >= 0 for row in state["waiting"])


def test_a_request_in_any_container_is_in_the_state_once():
    from llama_worker._state import waiting_requests

    bench = Bench("reply", n_parallel=1).load()
    sinks = [bench.ask(f"prompt {i}", max_tokens=3)[0] for i in range(6)]
    bench.embed("text")
    change = bench.reload(n_ctx=512)
    while not (change.answer.done() and all(sink.is_answered for sink in sinks)):
        waiting = waiting_requests(bench.service)
        assert len({request.cancel for request in waiting}) == len(waiting)
        open_ones = sum(not sink.is_answered for sink in sinks)
        running = len(bench.service.loaded.scheduler.running) if bench.service.loaded else 0
        generations = [request for request in waiting if not isinstance(request.job.request, EmbedRequest)]
        assert len(generations) == open_ones - running
        bench.step()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"model": {"model": "fake://model", "n_ctx": -1}}, "model.n_ctx"),
        ({"model": {"model": "fake://model", "n_context": 1}}, "model.n_context"),
        ({"worker": {"queue_size": "many"}}, "worker.queue_size"),
        ({"model": 7}, "model"),
        ({"extra": 1}, "extra"),
        ({"waiting": [{"kind": "generate"}]}, "waiting.0.age"),
        ({"status": object()}, "state"),
        ({"status": {"nan": float("nan")}}, "state"),
    ],
)
def test_a_state_that_cannot_be_read_says_which_field(changes: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as wrong:
        LlamaWorker.import_state(exported(**changes), loader=fake_loader())
    assert wrong.value.field == field


@pytest.mark.parametrize("missing", ["version", "model", "worker", "status", "metrics"])
def test_a_state_that_lacks_a_field_is_refused(missing: str):
    state = exported()
    del state[missing]
    with pytest.raises(ConfigError) as wrong:
        LlamaWorker.import_state(state, loader=fake_loader())
    assert wrong.value.field == missing


def test_something_else_is_no_state():
    with pytest.raises(ConfigError, match="state"):
        LlamaWorker.import_state("a path", loader=fake_loader())  # type: ignore[arg-type]
