"""What a worker keeps can be taken along: to a folder, as bytes, into another worker; and only where it belongs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_worker import (
    ConfigError,
    InvalidRequestError,
    LlamaWorker,
    Message,
    ModelConfig,
    ModelLoadError,
    StateError,
    UnsupportedFeatureError,
    WorkerClosed,
    WorkerConfig,
)
from llama_worker._commands import Export, Import
from llama_worker._entry import Entry, entry_of, saved_prefix
from llama_worker._other_load import OtherLoad
from llama_worker.testing import Fault, fake_loader, fake_worker
from tests.worker.test_going_back import alone, opened
from tests.worker.waiting import wait_until

KINDS = ["plain", "window", "hybrid"]
WORDS = "what was said about it before " * 10


def told(bench: Any, *commands: Export | Import) -> list[Any]:
    for command in commands:
        assert bench.channel.command(command)
    while not all(command.answer.done() for command in commands):
        bench.step()
    return [command.answer.result() for command in commands]


def imported(*entries: Entry) -> Import:
    """What another worker is told to keep, as it comes from a file."""
    return Import(epoch=1, entries=tuple(entry_of(saved_prefix(entry, bytes(16))) for entry in entries))


def conversation(i: int) -> list[Message]:
    return [Message(role="user", content=f"{i} " + WORDS)]


def ask(bench: Any, messages: list[Message]) -> Any:
    sink, _ = bench.ask(messages)
    bench.settle(sink)
    return sink


# --- the worker's side


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_kept_moves_to_another_worker(kind: str):
    """What slots hold and what waits in RAM, each once; a next turn there computes what is new in it."""
    bench = opened(kind, n_parallel=2)
    histories = [conversation(i) for i in range(4)]
    for history in histories:
        history.append(Message(role="assistant", content=ask(bench, history).text))
    (entries,) = told(bench, Export(epoch=1))
    assert len(entries) == 4
    other = opened(kind, n_parallel=2)
    assert told(other, imported(*entries)) == [4]
    for history in histories:
        history.append(Message(role="user", content="and?"))
        sink = ask(other, history)
        assert sink.text == alone(history)
        assert sink.terminal.usage.cached_tokens >= len(WORDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_found_wherever_it_is(kind: str):
    """In a slot or in RAM; as much of it as there is; and who exports loses nothing."""
    bench = opened(kind, n_parallel=2)
    histories = [conversation(i) for i in range(3)]
    turns = [[*history, Message(role="assistant", content=alone(history))] for history in histories]
    for history in histories:
        ask(bench, history)
    for turn in turns:
        prompt = bench.request(turn).job.prompt
        (entries,) = told(bench, Export(epoch=1, tokens=prompt))
        (entry,) = entries
        assert len(WORDS) <= entry.n <= len(prompt)
        assert np.array_equal(entry.tokens, prompt[: entry.n])
        other = opened(kind)
        assert told(other, imported(entry)) == [1]
        sink = ask(other, turn)
        assert (sink.text, sink.terminal.usage.cached_tokens >= entry.n) == (alone(turn), True)
    for turn in turns:
        assert ask(bench, turn).terminal.usage.cached_tokens >= len(WORDS)


@pytest.mark.parametrize("cache_ram", [0, 64])
@pytest.mark.parametrize("n_parallel", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_an_export_of_a_beginning_leaves_the_longer_conversation(kind: str, n_parallel: int, cache_ram: int):
    bench = opened(kind, n_parallel=n_parallel, cache_ram=cache_ram)
    system = Message(role="system", content=WORDS)
    whole = [system, Message(role="user", content="a long question " * 30)]
    asked = ask(bench, whole)
    cache = bench.scheduler.cache
    held = [(slot.n, slot.tokens.view.copy(), [c.length for c in slot.checkpoints]) for slot in cache.slots]
    begun = bench.request([system, Message(role="user", content="z")]).job.prompt
    for _ in range(2):
        (entries,) = told(bench, Export(epoch=1, tokens=begun))
        cache.check()
        for slot, (n, tokens, places) in zip(cache.slots, held, strict=True):
            assert (slot.n, slot.busy, [c.length for c in slot.checkpoints]) == (n, False, places)
            assert np.array_equal(slot.tokens.view, tokens)
        if kind == "plain" or cache_ram:
            assert np.array_equal(entries[0].tokens, begun[: entries[0].n])
            assert 0 < entries[0].n <= len(begun)
    turn = [*whole, Message(role="assistant", content=asked.text), Message(role="user", content="and?")]
    sink = ask(bench, turn)
    assert sink.text == alone(turn)
    if kind == "plain":
        assert sink.terminal.usage.cached_tokens >= asked.terminal.usage.prompt_tokens


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_an_export_out_of_ram_leaves_what_the_slots_hold(kind: str):
    bench = opened(kind, n_parallel=1)
    system = Message(role="system", content=WORDS)
    asked = ask(bench, [system, Message(role="user", content="a long question " * 30)])
    ask(bench, conversation(0))
    cache = bench.scheduler.cache
    (slot,), (saved,) = cache.slots, cache.tier.entries
    held = slot.tokens.view.copy()
    begun = saved.tokens[: asked.terminal.usage.prompt_tokens]
    (entries,) = told(bench, Export(epoch=1, tokens=begun))
    cache.check()
    assert np.array_equal(slot.tokens.view, held)
    assert cache.tier.entries == [saved]
    (entry,) = entries
    assert np.array_equal(entry.tokens, begun[: entry.n])
    assert ask(bench, conversation(0)).text == alone(conversation(0))


def test_nothing_of_others_is_in_an_exported_prefix():
    """The slot goes on with what somebody else said."""
    bench = opened("plain", n_parallel=2)
    ask(bench, [*conversation(0), Message(role="assistant", content="a"), Message(role="user", content="my secret")])
    prompt = bench.request(conversation(0)).job.prompt
    ((entry,),) = told(bench, Export(epoch=1, tokens=prompt))
    assert np.array_equal(entry.tokens, prompt[: entry.n])


def test_what_nobody_keeps_is_no_prefix():
    bench = opened("plain")
    ask(bench, conversation(0))
    assert told(bench, Export(epoch=1, tokens=bench.request("another one").job.prompt)) == [()]
    for other in (Export(epoch=2, tokens=bench.request(conversation(0)).job.prompt), Export(epoch=2)):
        with pytest.raises(OtherLoad):
            told(bench, other)


def test_an_export_waits_for_an_idle_slot_and_nobody_for_the_export():
    bench = opened("plain", n_parallel=1)
    sink, _ = bench.ask(conversation(0), max_tokens=30, ignore_eos=True)
    bench.step(3)
    command = Export(epoch=1, tokens=bench.request(conversation(0)).job.prompt)
    assert bench.channel.command(command)
    bench.step()
    assert not command.answer.done()
    bench.settle(sink, command.answer)
    assert command.answer.result()[0].n >= len(WORDS)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_ram_tier_an_import_goes_into_a_slot(kind: str):
    bench, other = opened(kind), opened(kind, cache_ram=0)
    ask(bench, conversation(0))
    (entries,) = told(bench, Export(epoch=1))
    assert told(other, imported(*entries)) == [1]
    history = [*conversation(0), Message(role="assistant", content=alone(conversation(0)))]
    history.append(Message(role="user", content="and?"))
    assert ask(other, history).text == alone(history)


def test_an_import_that_finds_no_room_is_not_kept_and_disturbs_nobody():
    bench, other = opened("plain"), opened("plain", cache_ram=0, n_parallel=1)
    ask(bench, conversation(0))
    (entries,) = told(bench, Export(epoch=1))
    sink, _ = other.ask(conversation(1), max_tokens=30, ignore_eos=True)
    other.step(3)
    assert told(other, imported(*entries)) == [0]
    other.settle(sink)
    assert len(sink.text) == 30
    tiny = opened("plain", n_ctx=256, cache_ram=1)
    assert told(tiny, imported(*entries)) == [0], "longer than the context"


def test_what_is_kept_already_is_not_kept_twice():
    bench = opened("plain")
    ask(bench, conversation(0))
    (entries,) = told(bench, Export(epoch=1))
    assert told(bench, imported(*entries)) == [1]
    assert bench.scheduler.cache.tier.entries == []


def test_no_request_is_lost_when_states_cannot_be_copied():
    bench = opened("plain", faults=[Fault("seq_save", StateError("no room"))])
    ask(bench, conversation(0))
    assert told(bench, Export(epoch=1)) == [()]
    assert ask(bench, conversation(0)).text == alone(conversation(0))


def test_who_waits_for_an_export_hears_of_the_end():
    bench = opened("plain", n_parallel=1)
    bench.ask(conversation(0), max_tokens=30, ignore_eos=True)
    bench.step(3)
    commands = [Export(epoch=1, tokens=bench.request(conversation(0)).job.prompt), Export(epoch=1)]
    for command in commands[:1]:
        assert bench.channel.command(command)
    bench.step()
    assert bench.channel.command(commands[1])
    bench.shut_down()
    for command in commands:
        assert isinstance(command.answer.exception(), WorkerClosed) or command.answer.result()


# --- the callers' side


@pytest.fixture
def worker() -> Iterator[LlamaWorker]:
    with fake_worker() as worker:
        worker.generate(WORDS, max_tokens=16, ignore_eos=True)
        yield worker


def test_a_folder_carries_the_cache_to_another_worker(worker: LlamaWorker, tmp_path: Path):
    assert worker.export_cache(tmp_path) == 1
    assert worker.export_cache(str(tmp_path)) == 1, "again: the same file"
    assert len(list(tmp_path.iterdir())) == 1
    with fake_worker() as other:
        assert other.import_cache(tmp_path) == 1
        assert other.generate(WORDS, max_tokens=16).usage.cached_tokens == len(WORDS)


async def test_the_async_twins_do_the_same_and_block_no_loop(worker: LlamaWorker, tmp_path: Path):
    ticks, ended = 0, asyncio.Event()

    async def tick() -> None:
        nonlocal ticks
        while not ended.is_set():
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    assert await worker.aexport_cache(tmp_path) == 1
    with fake_worker() as other:
        assert await other.aimport_cache(tmp_path) == 1
    ended.set()
    await ticking
    assert ticks > 2


def test_the_config_names_the_folder(tmp_path: Path):
    with fake_worker(cache_dir=str(tmp_path / "kept")) as worker:
        worker.generate(WORDS, max_tokens=16)
        assert worker.export_cache() == 1
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_an_export_to_the_own_folder_keeps_to_its_budget_and_replaces_what_it_leads_to(tmp_path: Path):
    folder = tmp_path / "kept"
    with fake_worker("hi there " * 10, cache_dir=str(folder), cache_disk=1, n_ctx=16384, n_parallel=2) as worker:
        history = conversation(0)
        for _ in range(3):
            reply = worker.generate(history)
            history += [Message(role="assistant", content=reply.text), Message(role="user", content="more " * 100)]
            assert worker.export_cache(folder / ".." / "kept") == 1
            assert len(list(folder.iterdir())) == 1
        for i in range(8):
            worker.generate([Message(role="user", content=f"{i} " + "another " * 1500)])
            there = worker.export_cache()
            assert there == len(list(folder.iterdir()))
            assert sum(path.stat().st_size for path in folder.iterdir()) <= 1 << 20
        assert 2 <= there < 9


def test_a_folder_is_where_it_was_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever the process goes, home or as a Path."""
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    worker = fake_worker(cache_dir=Path("kept"))
    assert worker.config.cache_dir == ModelConfig(model="m", cache_dir="~/kept").cache_dir == str(tmp_path / "kept")
    worker.generate(WORDS, max_tokens=16)
    monkeypatch.chdir(tmp_path / "later")
    worker.close()
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert list((tmp_path / "later").iterdir()) == []
    for wrong in ("", b"kept", 5):
        with pytest.raises(ConfigError, match="cache_dir"):
            ModelConfig(model="m", cache_dir=wrong)  # type: ignore[arg-type]


def test_without_a_folder_it_is_asked_for(worker: LlamaWorker):
    with pytest.raises(InvalidRequestError, match="cache_dir"):
        worker.export_cache()


def test_what_is_no_path_is_refused(worker: LlamaWorker):
    for call in (worker.export_cache, worker.import_cache):
        with pytest.raises(InvalidRequestError, match="path"):
            call(7)  # type: ignore[arg-type]


def test_a_file_in_the_place_of_the_folder_is_an_error_and_no_more(worker: LlamaWorker, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError):
        worker.export_cache(tmp_path / "file")
    assert worker.generate(WORDS, max_tokens=4).usage.cached_tokens == len(WORDS)


def test_a_folder_that_is_not_there_is_refused(worker: LlamaWorker, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    for wrong in ("nothing", "file"):
        with pytest.raises(InvalidRequestError, match="no such folder"):
            worker.import_cache(tmp_path / wrong)


def test_a_cache_dir_that_nobody_wrote_to_holds_nothing(tmp_path: Path):
    with fake_worker(cache_dir=str(tmp_path / "later")) as worker:
        assert worker.import_cache() == 0


def test_an_import_takes_no_more_than_ram_is_for(tmp_path: Path):
    with fake_worker(n_parallel=8) as worker:
        for i in range(8):
            worker.generate(f"{i} " * 1000, max_tokens=1)
        assert worker.export_cache(tmp_path) == 8
    with fake_worker(n_parallel=8, cache_ram=1) as other:
        largest = max(file.stat().st_size for file in tmp_path.iterdir())
        assert other.import_cache(tmp_path) == 8, f"8 of {largest} bytes"
    with fake_worker(n_parallel=8, cache_ram=0) as none:
        assert none.import_cache(tmp_path) == 0


OTHERS = {
    "model": {"model": "fake://other"},
    "template": {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"},
    "K type": {"type_k": "q8_0"},
    "V type": {"type_v": "q8_0"},
    "window": {"swa_full": False},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_anothers_is_never_used(other: str, worker: LlamaWorker, tmp_path: Path):
    worker.export_cache(tmp_path)
    view = worker._view()
    data = worker._transfer.export_prefix(view, view.prompt_tokens(WORDS)).result()
    assert data is not None
    with fake_worker(**OTHERS[other]) as stranger:  # type: ignore[arg-type]
        assert stranger.import_cache(tmp_path) == 0
        with pytest.raises(StateError, match="another model"):
            stranger._transfer.import_prefix(stranger._view(), data).result()
        assert stranger.generate(WORDS, max_tokens=4).usage.cached_tokens == 0


def test_a_prefix_travels_as_bytes(worker: LlamaWorker):
    view = worker._view()
    tokens = view.prompt_tokens(WORDS)
    data = worker._transfer.export_prefix(view, tokens).result()
    assert data is not None
    with fake_worker() as other:
        assert other._transfer.import_prefix(other._view(), data).result() == len(tokens)
        assert other.generate(WORDS + "and more", max_tokens=4).usage.cached_tokens == len(tokens)
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        with pytest.raises(StateError, match="damaged"):
            other._transfer.import_prefix(other._view(), bytes(damaged)).result()
    assert worker._transfer.export_prefix(view, view.prompt_tokens("unheard of")).result() is None


def test_a_closed_worker_says_so(tmp_path: Path):
    worker = fake_worker()
    view = worker._view()
    worker.close()
    with pytest.raises(WorkerClosed):
        worker.export_cache(tmp_path)
    futures: list[Future[Any]] = [
        worker._transfer.export_cache(view, tmp_path),
        worker._transfer.import_cache(view, tmp_path),
    ]
    for future in futures:
        with pytest.raises(WorkerClosed):
            future.result()


def test_a_model_without_states_refuses(tmp_path: Path):
    with fake_worker(loader=fake_loader(embedding=True)) as worker:
        with pytest.raises(UnsupportedFeatureError):
            worker.export_cache(tmp_path)


def test_a_reload_in_between_leaves_nothing_of_the_former_model(tmp_path: Path):
    with fake_worker() as worker:
        worker.generate(WORDS, max_tokens=4)
        former = worker._view()
        worker.reload(model="fake://other")
        assert worker._transfer.export_cache(former, tmp_path).result() == 0
        assert worker._transfer.import_cache(former, tmp_path).result() == 0


@pytest.mark.parametrize("keep_alive", [0.0, 0.05])
def test_a_model_that_was_let_go_is_loaded_for_an_import(worker: LlamaWorker, keep_alive: float, tmp_path: Path):
    worker.export_cache(tmp_path)
    view = worker._view()
    data = worker._transfer.export_prefix(view, view.prompt_tokens(WORDS)).result()
    assert data is not None
    with fake_worker(worker_config=WorkerConfig(keep_alive=keep_alive)) as other:
        for bring in (
            lambda: other.import_cache(tmp_path),
            lambda: other._transfer.import_prefix(other._view(), data).result(60),
        ):
            until_unloaded(other)
            assert bring()
        until_unloaded(other)
        assert other.export_cache(tmp_path) == 0, "nothing is kept by what is not loaded"


def test_an_import_during_a_reload_is_kept_by_the_new_load(worker: LlamaWorker, tmp_path: Path):
    worker.export_cache(tmp_path)
    loads, gate = iter(range(9)), threading.Event()

    def loader(config: ModelConfig) -> Any:
        if next(loads):
            gate.wait(60)
        return fake_loader()(config)

    with fake_worker(loader=loader) as other, ThreadPoolExecutor(2) as pool:
        reload = pool.submit(other.reload, overlap=False, n_parallel=2)
        wait_until(lambda: other.status().state != "ready")
        importing = pool.submit(other.import_cache, tmp_path)
        gate.set()
        reload.result(60)
        assert importing.result(60) == 1
        assert other.generate(WORDS, max_tokens=4).usage.cached_tokens >= len(WORDS)


def test_who_waits_with_a_transfer_hears_that_the_model_is_gone(worker: LlamaWorker, tmp_path: Path):
    worker.export_cache(tmp_path)
    gone = threading.Event()

    def loader(config: ModelConfig) -> Any:
        if gone.is_set():
            raise ModelLoadError("the file is gone")
        return fake_loader()(config)

    with fake_worker(loader=loader, worker_config=WorkerConfig(keep_alive=0.0)) as other:
        until_unloaded(other)
        gone.set()
        with pytest.raises(ModelLoadError, match="is gone"):
            other._transfer.import_cache(other._view(), tmp_path).result(60)


def until_unloaded(worker: LlamaWorker) -> None:
    wait_until(lambda: worker.status().state == "unloaded")
