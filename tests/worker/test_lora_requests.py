"""Adapters as callers see them: by name, with the model or later, for one request or all of a model's."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from llama_worker import (
    ConfigError,
    Failed,
    GenerationRequest,
    InvalidRequestError,
    LlamaWorker,
    LoraInfo,
    LoraLoadError,
    ManifestMismatchError,
    ModelConfig,
    ModelLoadError,
    UnsupportedFeatureError,
    WorkerClosed,
    WorkerConfig,
    get_handle,
)
from llama_worker._commands import ChangeLora
from llama_worker.testing import FakeEngine, Fault, Gate, fake_loader, fake_worker
from tests import synth_lora
from tests.worker.waiting import wait_until

PATHS = {"a": "fake://a", "b": "fake://b"}


# --- the forms of a choice


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"b": 1, "a": 0.5}, (("a", 0.5), ("b", 1.0))),
        ("a", (("a", 1.0),)),
        (["b", "a"], (("a", 1.0), ("b", 1.0))),
        (["b", ("a", -2)], (("a", -2.0), ("b", 1.0))),
        ({"a", "b"}, (("a", 1.0), ("b", 1.0))),
        ((), ()),
        ({}, ()),
        (None, ()),
    ],
)
def test_a_choice_may_be_written_in_several_ways(given: Any, kept: tuple[tuple[str, float], ...]):
    request = GenerationRequest(prompt="x", loras=given)
    assert request.loras == kept
    assert GenerationRequest(prompt="x", loras=request.model_dump(mode="json")["loras"]) == request


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {"a": "much"},
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": 101},
        {"a": True},
        {"a": None},
        ["a", "a"],
        [1],
        [("a", 1, 2)],
        {"": 1.0},
        {1: 1.0},
        {"a" * 129: 1.0},
        {f"{i}": 1.0 for i in range(65)},
    ],
    ids=repr,
)
def test_what_cannot_be_meant_is_refused(wrong: Any):
    with pytest.raises(InvalidRequestError, match="loras"):
        GenerationRequest(prompt="x", loras=wrong)


def test_an_unknown_name_is_named_with_the_known_ones():
    with fake_worker(lora_paths=PATHS) as worker:
        with pytest.raises(InvalidRequestError, match=r"loras='c': the adapters that are loaded are 'a', 'b'"):
            worker.generate("x", loras={"a": 1.0, "c": 1.0})
        assert worker.generate("x", max_tokens=2).usage.completion_tokens == 2
    with fake_worker() as worker, pytest.raises(InvalidRequestError, match=r"loras='c': no adapter is loaded"):
        worker.generate("x", loras="c")


def test_more_at_once_than_the_model_takes_are_refused():
    paths = {f"{i}": f"fake://{i}" for i in range(9)}
    with fake_worker(lora_paths=paths) as worker:
        with pytest.raises(UnsupportedFeatureError, match="at most 8 at once"):
            worker.generate("x", loras=list(paths))
        assert worker.generate("x", max_tokens=2, loras=dict.fromkeys(paths, 0) | {"1": 1.0}).text


def test_embedding_takes_none():
    with fake_worker(lora_paths=PATHS) as worker, pytest.raises(TypeError):
        worker.embed(["x"], loras="a")  # type: ignore[call-arg]


def test_a_configuration_keeps_adapters_in_the_order_of_their_names():
    config = ModelConfig(model="m", lora_paths={"b": Path("/y"), "a": "/x"})
    assert config.lora_paths == (("a", "/x"), ("b", "/y"))
    assert config == ModelConfig(model="m", lora_paths=[("a", "/x"), ("b", "/y")])
    assert hash(config) == hash(ModelConfig(**config.model_dump(mode="json")))


@pytest.mark.parametrize(
    "wrong", [3, "x", {"a": 3}, {"": "x"}, [("a", "x"), ("a", "y")], ["ab"], [1], {"a": ""}], ids=repr
)
def test_a_configuration_that_cannot_be_meant_is_refused(wrong: Any):
    with pytest.raises(ConfigError, match="lora_paths"):
        ModelConfig(model="m", lora_paths=wrong)


# --- with every way to ask


async def test_every_way_of_asking_takes_them():
    with fake_worker(lora_paths=PATHS) as worker:
        expected = worker.generate("hello", max_tokens=8, loras={"a": 0.5}).text
        assert expected != worker.generate("hello", max_tokens=8).text
        assert worker.stream("hello", max_tokens=8, loras={"a": 0.5}).reply().text == expected
        assert (await worker.agenerate("hello", max_tokens=8, loras={"a": 0.5})).text == expected
        assert (await worker.astream("hello", max_tokens=8, loras={"a": 0.5}).reply()).text == expected
        (batched,) = worker.infer_batch(["hello"], max_tokens=8, loras={"a": 0.5})
        assert not isinstance(batched, Exception)
        assert batched.text == expected
        whole = GenerationRequest(prompt="hello", params={"max_tokens": 8}, loras={"a": 0.5})  # type: ignore[arg-type]
        assert worker.generate(whole).text == expected


def test_many_threads_with_different_sets_get_what_each_would_get_alone():
    sets: list[Any] = [(), "a", "b", {"a": 0.5}, ["a", "b"]]
    texts: dict[int, str] = {}
    with fake_worker(lora_paths=PATHS, worker_config=WorkerConfig(queue_size=64)) as worker:
        alone = [worker.generate("hello", max_tokens=24, loras=loras).text for loras in sets]

        def ask(i: int) -> None:
            texts[i] = worker.generate("hello", max_tokens=24, loras=sets[i % 5]).text

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counted = worker.lora_metrics()
    assert texts == {i: alone[i % 5] for i in range(30)}
    assert (counted["a"].requests, counted["b"].requests) == (21, 14)
    assert counted["a"].completion_tokens == sum(len(texts[i]) for i in texts if i % 5 in (1, 3, 4)) + sum(
        len(alone[i]) for i in (1, 3, 4)
    )
    assert counted["a"].switches >= 3
    assert counted["a"].bytes == 1000


# --- adding and removing


def test_added_later_it_is_offered_from_then_on():
    with fake_worker() as worker:
        with pytest.raises(InvalidRequestError):
            worker.generate("hello", loras="a")
        worker.add_lora("a", "fake://a")
        assert isinstance(worker.loras["a"], LoraInfo)
        added = worker.generate("hello", max_tokens=8, loras="a").text
        assert worker.config.lora_paths == (("a", "fake://a"),)
        worker.remove_lora("a")
        assert not worker.loras
        assert worker.config.lora_paths == ()
        with pytest.raises(InvalidRequestError):
            worker.generate("hello", loras="a")
        with pytest.raises(InvalidRequestError, match=r"loras='a': no adapter is loaded"):
            worker.remove_lora("a")
    with fake_worker(lora_paths=PATHS) as worker:
        assert worker.generate("hello", max_tokens=8, loras="a").text == added


async def test_the_async_twins_do_the_same(tmp_path: Path):
    with fake_worker() as worker:
        await worker.aadd_lora("a", "fake://a")
        assert set(worker.loras) == {"a"}
        with pytest.raises(LoraLoadError):
            await worker.aadd_lora("b", str(tmp_path / "absent.gguf"))
        await worker.aremove_lora("a")
        with pytest.raises(InvalidRequestError):
            await worker.aremove_lora("a")
        assert not worker.loras


def test_one_that_cannot_be_loaded_changes_nothing(tmp_path: Path):
    with fake_worker(lora_paths=PATHS) as worker:
        before = dict(worker.loras)
        with pytest.raises(LoraLoadError, match="no such file"):
            worker.add_lora("a", str(tmp_path / "absent.gguf"))
        for name, path in (("", "fake://c"), ("c", ""), ("c" * 200, "fake://c")):
            with pytest.raises(ConfigError):
                worker.add_lora(name, path)
        assert worker.loras == before
        assert worker.config.lora_paths == tuple(PATHS.items())
        assert worker.generate("hello", max_tokens=2, loras="a").text


def test_no_more_than_64_are_held():
    with fake_worker(lora_paths={f"{i}": f"fake://{i}" for i in range(64)}) as worker:
        with pytest.raises(ConfigError, match="lora_paths"):
            worker.add_lora("one more", "fake://more")
        worker.remove_lora("7")
        worker.add_lora("one more", "fake://more")


class Held:
    """A worker whose decodes a test can hold."""

    def __init__(self, **config: Any) -> None:
        self.engines: list[FakeEngine] = []
        self.gate = Gate()
        loader = fake_loader(gate=self.gate, seen=self.engines.append)
        self.worker = fake_worker(loader=loader, worker_config=WorkerConfig(queue_size=8), **config)

    def begun(self, **asked: Any) -> Any:
        """A stream whose first token is about to be computed."""
        self.gate.shut()
        stream = self.worker.stream("hello", max_tokens=20, ignore_eos=True, **asked)
        self.gate.wait_reached()
        return stream


def test_who_has_begun_finishes_and_who_waits_is_refused():
    """And then the adapter's memory is given back."""
    held = Held(lora_paths=PATHS, n_parallel=1)
    with held.worker as worker:
        expected = worker.generate("hello", max_tokens=20, ignore_eos=True, loras="a").text
        running = held.begun(loras="a")
        there = worker.stream("hello", max_tokens=20, ignore_eos=True, loras="a")  # in the scheduler or in the channel
        queued = [worker.stream("hello", max_tokens=20, ignore_eos=True, loras="a") for _ in range(4)]
        other = worker.stream("hello", max_tokens=20, ignore_eos=True, loras="b")
        removing = threading.Thread(target=worker.remove_lora, args=("a",))
        removing.start()
        held.gate.open()
        removing.join()
        assert running.reply().text == expected
        ends = [list(stream)[-1] for stream in (there, *queued)]
        refused = [end for end in ends if isinstance(end, Failed)]
        assert refused
        assert all(isinstance(end.error, InvalidRequestError) for end in refused)
        assert {end.text for end in ends if not isinstance(end, Failed)} <= {expected}
        assert other.reply().text
        worker.generate("x", max_tokens=1)
        digests = {info.digest for info in worker.loras.values()}
        assert set(held.engines[0].loras) == digests
        assert held.engines[0].calls.count("free_lora") == 1


def test_a_name_that_is_given_to_another_file_means_that_from_then_on():
    held = Held(lora_paths=PATHS, n_parallel=1)
    with held.worker as worker:
        old = worker.generate("hello", max_tokens=20, ignore_eos=True, loras="a").text
        new = worker.generate("hello", max_tokens=20, ignore_eos=True, loras="b").text
        assert old != new
        running = held.begun(loras="a")
        changing = threading.Thread(target=worker.add_lora, args=("a", "fake://b"))
        changing.start()
        held.gate.open()
        changing.join()
        assert running.reply().text == old
        assert worker.generate("hello", max_tokens=20, ignore_eos=True, loras="a").text == new
        assert worker.generate("hello", max_tokens=20, ignore_eos=True, loras={"a": 0.5, "b": 0.5}).text == new


def test_one_content_under_two_names_stays_as_long_as_one_of_them():
    engines: list[FakeEngine] = []
    loader = fake_loader(seen=engines.append)
    with fake_worker(loader=loader, lora_paths={"a": "fake://x", "b": "fake://x"}) as worker:
        text = worker.generate("hello", max_tokens=8, loras="a").text
        worker.remove_lora("a")
        assert worker.generate("hello", max_tokens=8, loras="b").text == text
        worker.remove_lora("b")
        worker.generate("x", max_tokens=1)
        assert not engines[0].loras


# --- reloading


def test_a_reload_keeps_or_replaces_them_as_its_configuration_says():
    with fake_worker(lora_paths={"a": "fake://a"}) as worker:
        worker.add_lora("b", "fake://b")
        worker.reload(n_ctx=2048)
        assert set(worker.loras) == {"a", "b"}
        worker.reload(lora_paths={"c": "fake://c"})
        assert set(worker.loras) == {"c"}
        worker.reload(ModelConfig(model="fake://other"))
        assert not worker.loras


def test_a_reload_whose_adapters_cannot_be_loaded_leaves_the_former_model(tmp_path: Path):
    with fake_worker(lora_paths=PATHS) as worker:
        with pytest.raises(ModelLoadError) as refused:
            worker.reload(lora_paths={"a": str(tmp_path / "absent.gguf")})
        assert refused.value.previous_restored
        assert set(worker.loras) == {"a", "b"}
        assert worker.generate("hello", max_tokens=2, loras="a").text


def test_who_waits_through_a_reload_uses_the_new_adapters_or_hears_that_there_are_none():
    held = Held(lora_paths=PATHS, n_parallel=1)
    with held.worker as worker:
        running = held.begun(loras="a")
        queued = [worker.stream("hello", max_tokens=2, loras=name) for name in "aabb"]
        reloading = threading.Thread(target=worker.reload, kwargs={"lora_paths": {"b": "fake://other"}})
        reloading.start()
        held.gate.open()
        reloading.join()
        running.reply()
        ends = [list(stream)[-1] for stream in queued]
    assert [isinstance(end, Failed) for end in ends][-2:] == [False, False]
    assert any(isinstance(end, Failed) and isinstance(end.error, InvalidRequestError) for end in ends[:2])


def test_a_model_that_was_unloaded_is_loaded_for_a_change():
    with fake_worker(worker_config=WorkerConfig(keep_alive=0.0), lora_paths={"a": "fake://a"}) as worker:
        worker.generate("hello", max_tokens=2, loras="a")
        worker.add_lora("b", "fake://b")
        assert worker.generate("hello", max_tokens=2, loras="b").text
        assert set(worker.loras) == {"a", "b"}


def unloaded(*missing: str) -> LlamaWorker:
    """A worker whose model was let go, and then these files went."""
    gone = threading.Event()

    def load(config: ModelConfig) -> Any:
        bad = [name for name, path in config.lora_paths if path in missing]
        if gone.is_set() and bad:
            raise LoraLoadError(bad[0], "the file is gone")
        return fake_loader()(config)

    worker = fake_worker(loader=load, worker_config=WorkerConfig(keep_alive=0.0), lora_paths=PATHS)
    wait_until(lambda: worker.status().state == "unloaded")
    gone.set()
    return worker


def soon(change: ChangeLora) -> None:
    change.answer.result(60)


def test_an_adapter_whose_file_is_gone_can_be_removed_from_a_model_that_was_let_go():
    with unloaded("fake://a") as worker:
        with pytest.raises(LoraLoadError):
            worker.generate("hello", max_tokens=2)
        soon(worker._change_lora("a", None))
        assert worker.generate("hello", max_tokens=2, loras="b").text
        assert set(worker.loras) == {"b"}


def test_of_two_whose_files_are_gone_each_can_be_removed():
    with unloaded("fake://a", "fake://b") as worker:
        for name in PATHS:
            soon(worker._change_lora(name, None))
        assert worker.generate("hello", max_tokens=2).text
        assert set(worker.loras) == set()


def test_who_changes_adapters_of_a_model_that_does_not_come_back_hears_why():
    with unloaded("fake://a") as worker:
        for name, path in (("c", "fake://c"), ("c", None), ("a", "fake://other")):
            with pytest.raises(LoraLoadError, match="gone"):
                soon(worker._change_lora(name, path))


def test_adding_while_it_loads_waits_for_the_model():
    with LlamaWorker.begin(ModelConfig(model="fake://model"), loader=fake_loader()) as worker:
        worker.add_lora("a", "fake://a")
        assert set(worker.loras) == {"a"}


def test_a_worker_that_ends_answers_who_waits_for_a_change():
    held = Held()
    held.begun()
    answers: list[WorkerClosed] = []

    def add() -> None:
        try:
            held.worker.add_lora("a", "fake://a")
        except WorkerClosed as exc:
            answers.append(exc)

    adding = threading.Thread(target=add)
    adding.start()
    held.worker.cancel_all()
    held.worker.close()
    held.gate.open()
    adding.join(60)
    assert not adding.is_alive()
    assert all(isinstance(error, WorkerClosed) for error in answers)
    with pytest.raises(WorkerClosed):
        held.worker.add_lora("a", "fake://a")


def test_a_file_that_fails_while_it_is_read_fails_its_caller_alone():
    loader = fake_loader(faults=[Fault("load_lora", LoraLoadError("a", "no memory"))])
    with fake_worker(loader=loader) as worker:
        with pytest.raises(LoraLoadError, match="no memory"):
            worker.add_lora("a", "fake://a")
        worker.add_lora("a", "fake://a")
        assert worker.generate("x", max_tokens=1, loras="a").text


# --- what is said of them


def test_diagnostics_and_states_name_files_without_their_folders():
    with fake_worker(lora_paths={"a": "fake:///home/somebody/a"}) as worker:
        worker.generate("x", max_tokens=3, ignore_eos=True, loras="a")
        said = worker.diagnostics()
        assert "somebody" not in repr(said)
        assert said["loras"]["a"]["completion_tokens"] == 3
        state = worker.export_state()
    twin = LlamaWorker.import_state(state, loader=fake_loader())
    assert set(twin.loras) == {"a"}
    twin.close()


def test_metrics_outlive_what_they_count():
    with fake_worker(lora_paths=PATHS) as worker:
        assert worker.lora_metrics()["b"].requests == 0
        worker.generate("x", max_tokens=3, ignore_eos=True, loras="a")
        worker.remove_lora("a")
        counted = worker.lora_metrics()["a"]
        assert (counted.requests, counted.completion_tokens, counted.switches, counted.bytes) == (1, 3, 1, 0)
        worker.reload(lora_paths={})
        assert worker.lora_metrics()["a"] == counted
    assert "b" not in worker.lora_metrics()


def test_equal_adapters_are_equal_configurations():
    first = get_handle(ModelConfig(model="/nowhere.gguf", lora_paths={"a": "/x", "b": "/y"}))
    assert get_handle(ModelConfig(model="/nowhere.gguf", lora_paths=[("b", "/y"), ("a", "/x")])) is first
    assert get_handle(ModelConfig(model="/nowhere.gguf", lora_paths={"a": "/x"})) is not first


# --- on the real engine


@pytest.mark.engine
def test_a_worker_with_adapters_of_its_own(tiny_llama: Path, tmp_path: Path):
    style = synth_lora.lora(tmp_path / "style.gguf", tiny_llama)
    facts = synth_lora.lora(tmp_path / "facts.gguf", tiny_llama, seed=2)
    asked = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    config = ModelConfig(model=str(tiny_llama), n_ctx=1024, n_threads=1, lora_paths={"style": style})
    with LlamaWorker(config) as worker:
        base = worker.generate("hello world", **asked).text
        styled = worker.generate("hello world", **asked, loras="style").text
        assert styled != base
        worker.add_lora("facts", facts)
        assert worker.generate("hello world", **asked, loras="facts").text not in (base, styled)
        assert worker.loras["facts"].rank == 4
        worker.remove_lora("facts")
        worker.reload(n_ctx=512)
        assert worker.generate("hello world", **asked, loras="style").text == styled
        with pytest.raises(LoraLoadError, match="cannot be used") as refused:
            worker.reload(lora_paths={"style": tiny_llama})
        assert refused.value.previous_restored
    with LlamaWorker(ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1)) as worker:
        worker.add_lora("style", style)
        assert worker.generate("hello world", **asked, loras="style").text == styled
    with pytest.raises(LoraLoadError, match=r"absent\.gguf"):
        LlamaWorker(ModelConfig(model=str(tiny_llama), lora_paths={"x": tmp_path / "absent.gguf"}))


@pytest.mark.engine
async def test_adapters_come_and_go_under_load(tiny_llama: Path, tmp_path: Path):
    """Nobody's request is harmed who does not name what is gone."""
    paths = [synth_lora.lora(tmp_path / f"{i}.gguf", tiny_llama, seed=i) for i in range(3)]
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1, lora_paths={"kept": paths[0]})
    with LlamaWorker(config, WorkerConfig(queue_size=64)) as worker:

        async def ask(i: int) -> str:
            loras = [{}, {"kept": 1.0}, {"kept": 0.5}][i % 3]
            reply = await worker.agenerate("hello", max_tokens=8, temperature=0.0, ignore_eos=True, loras=loras)
            return reply.text

        async def change() -> None:
            for i in range(10):
                await worker.aadd_lora("other", paths[1 + i % 2])
                await worker.agenerate("hello", max_tokens=2, loras={"other": 1.0, "kept": 0.2})
                await worker.aremove_lora("other")

        texts = await asyncio.gather(*(ask(i) for i in range(60)), change())
    assert all(len(text) for text in texts[:-1])  # type: ignore[arg-type]


# --- sessions


def test_a_session_has_adapters_of_its_own():
    system, question = {"role": "system", "content": "be brief " * 20}, {"role": "user", "content": "why?"}
    with fake_worker(lora_paths=PATHS) as worker:
        with worker.session(loras={"a": 0.5}) as session:
            session.ensure_prefix([system])
            session.prefill_suffix([question])
            reply = session.decode(max_tokens=8).reply()
            assert reply.text == worker.generate([system, question], max_tokens=8, loras={"a": 0.5}).text
            assert reply.usage.cached_tokens == reply.usage.prompt_tokens - 1
            assert session.manifest is not None
            assert session.manifest.identity.loras == ((worker.loras["a"].digest, 0.5),)
            with pytest.raises(InvalidRequestError, match="loras"):
                session.decode(loras="b")
            with pytest.raises(InvalidRequestError, match="loras"):
                worker.session(loras=3)
            worker.add_lora("a", "fake://other")
            with pytest.raises(ManifestMismatchError, match="LoRA adapters are others"):
                session.decode(max_tokens=8).reply()
            worker.remove_lora("a")
            with pytest.raises(InvalidRequestError, match="loras='a'"):
                session.prefill_suffix([question])


def test_what_is_warmed_is_warm_for_the_same_adapters():
    system = {"role": "system", "content": "be brief " * 20}
    with fake_worker(lora_paths=PATHS) as worker:
        worker.warm([system], loras="a")
        asked = [system, {"role": "user", "content": "why?"}]
        assert worker.generate(asked, max_tokens=2).usage.cached_tokens == 0
        assert worker.generate(asked, max_tokens=2, loras="a").usage.cached_tokens > 150
