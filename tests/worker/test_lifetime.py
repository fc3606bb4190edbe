"""From the first use to the last: registry, copies, closing, dropping, leaving the interpreter."""

import asyncio
import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from llama_worker import LlamaWorker, ModelConfig, ModelLoadError, WorkerClosed, WorkerConfig, close_all, get_worker
from llama_worker.testing import fake_loader, fake_worker
from tests.worker.waiting import wait_until


@pytest.fixture(autouse=True)
def _clean_registry():
    yield
    close_all()


@pytest.mark.engine
def test_equal_configurations_share_one_worker(tiny_llama: Path):
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1)
    worker = get_worker(config)
    detour = tiny_llama.parent / "somewhere" / ".." / tiny_llama.name
    assert get_worker(ModelConfig(model=str(detour), n_ctx=512, n_threads=1)) is worker
    assert get_worker(ModelConfig(model=str(tiny_llama), n_ctx=1024, n_threads=1)) is not worker
    assert get_worker(config, WorkerConfig(queue_size=9)) is not worker


@pytest.mark.engine
def test_a_worker_that_was_closed_is_replaced_and_a_pickle_finds_the_live_one(tiny_llama: Path):
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1)
    worker = get_worker(config)
    assert pickle.loads(pickle.dumps(worker)) is worker
    worker.close()
    assert get_worker(config) is not worker


def test_the_registry_loads_in_the_background_and_the_first_use_learns_of_a_failure():
    worker = get_worker("/nowhere/model.gguf")
    with pytest.raises(ModelLoadError):
        worker.generate("hello")
    wait_until(lambda: worker.is_closed)
    assert get_worker("/nowhere/model.gguf") is not worker


async def test_an_async_first_use_learns_of_a_failure_too():
    worker = get_worker("/nowhere/model.gguf")
    with pytest.raises(ModelLoadError):
        await worker.agenerate("hello")
    with pytest.raises(ModelLoadError):
        await worker.aembed(["hello"])


def test_copies_are_the_same_worker():
    worker = get_worker("/nowhere/model.gguf")
    assert copy.deepcopy({"worker": worker})["worker"] is worker
    assert copy.copy(worker) is worker


def test_a_pickle_is_the_very_worker_in_its_own_process_whoever_opened_it():
    with fake_worker("answer") as worker:
        assert pickle.loads(pickle.dumps({"worker": worker}))["worker"] is worker


@pytest.mark.engine
def test_a_pickle_of_a_worker_that_is_gone_is_the_registrys(tiny_llama: Path):
    config = ModelConfig(model=str(tiny_llama), n_ctx=512, n_threads=1)
    with LlamaWorker(config) as worker:
        pickled = pickle.dumps(worker)
    assert pickle.loads(pickled) is get_worker(config)


def test_close_is_idempotent_and_final():
    worker = fake_worker("answer")
    worker.close()
    worker.close()
    assert worker.is_closed
    with pytest.raises(WorkerClosed):
        worker.generate("hello")
    with pytest.raises(WorkerClosed):
        worker.embed(["hello"])


async def test_aclose_waits_for_the_worker_without_blocking():
    worker = fake_worker("answer")
    await worker.aclose()
    assert worker.is_closed
    with pytest.raises(WorkerClosed):
        await worker.agenerate("hello")


def test_a_worker_that_is_dropped_ends_its_thread_and_frees_its_engine():
    engines = []
    worker = fake_worker(loader=fake_loader("answer", seen=engines.append))
    thread = worker._thread
    del worker
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert engines[0].closed
    assert all(sampler.closed for sampler in engines[0].samplers)


def test_one_worker_serves_several_event_loops_that_come_and_go():
    with fake_worker("answer", n_parallel=2) as worker:

        def run_loop() -> list[str]:
            async def ask() -> list[str]:
                return [reply.text for reply in await asyncio.gather(*[worker.agenerate("x") for _ in range(5)])]

            return asyncio.run(ask())

        results: list[list[str]] = []
        threads = [threading.Thread(target=lambda: results.append(run_loop())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert results == [["answer"] * 5] * 4


LEAVING = {
    "idle": "",
    "a stream half read": "stream = worker.stream('x', max_tokens=3000, ignore_eos=True); next(stream)",
    "a request in a thread": "threading.Thread(target=ask, args=(worker,), daemon=True).start()",
    "a decode that hangs": "worker = hanging(); stream = worker.stream('x')",
    "an async stream left": "asyncio.run(anext(worker.astream('x', max_tokens=3000, ignore_eos=True)))",
    "closed": "worker.close()",
}


@pytest.mark.parametrize("situation", LEAVING)
def test_the_interpreter_leaves_at_once_in_any_state(situation: str):
    """Exit status 0, nothing on stderr, without close()."""
    program = f"""
        import asyncio, threading
        from llama_worker import WorkerClosed
        from llama_worker.testing import *

        def ask(worker):
            try:
                worker.generate('x', max_tokens=3000, ignore_eos=True)
            except WorkerClosed:
                pass

        def hanging():
            return fake_worker(loader=fake_loader(faults=[Fault('decode', 'hang')]))

        worker = fake_worker()
        {LEAVING[situation]}
        print("leaving", flush=True)
    """
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "leaving\n", "")


FORK = """
    import asyncio, gc, os, sys, threading, time, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Python's own about forking with threads
    from llama_worker import *
    from llama_worker.testing import *

    def refused(ask):
        try:
            ask()
        except WorkerClosed as error:
            return "fork" in str(error)
        return False

    def in_child(check):
        child = os.fork()
        if child == 0:
            os._exit(0 if check() else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def forking(program: str, *args: str) -> str:
    """What `program` prints, within 30 seconds."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK) + textwrap.dedent(program), *args],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout


def test_a_forked_child_is_refused_at_once_and_the_parent_serves_on():
    """Whatever state the worker is in; a child that waited for a thread it does not have would wait for ever."""
    printed = forking("""
        forked, unloaded = fake_loader("answer"), threading.Event()
        def slowly(config):
            unloaded.wait()
            return forked(config)

        ready = fake_worker("answer")
        loading = LlamaWorker.begin("fake://model", loader=slowly)

        def is_refused(worker):
            asks = [lambda: worker.generate("x"), lambda: worker.stream("x"), lambda: worker.embed(["x"])]
            asks += [lambda: asyncio.run(worker.agenerate("x")), lambda: asyncio.run(worker.aembed(["x"]))]
            asks += [lambda: worker.info, lambda: worker.count_tokens("x"), worker.cancel_all]
            asks += [lambda: worker.reload(n_ctx=99), lambda: asyncio.run(worker.areload(n_ctx=99))]
            asks += [lambda: asyncio.run(worker.awarmup()), lambda: asyncio.run(worker.aadd_lora("a", "fake://a"))]
            asks += [lambda: asyncio.run(worker.aexport_cache(".")), lambda: asyncio.run(worker.aimport_cache("."))]
            says = {worker.status().state, worker.health().state}
            return all(map(refused, asks)) and worker.is_closed and says == {"closed"}

        asyncio.run(ready.agenerate("x"))  # now its preparer has a thread, which a child does not
        print(in_child(lambda: is_refused(ready)), in_child(lambda: is_refused(loading)))
        unloaded.set()
        print(ready.generate("x").text, loading.generate("x").text)
    """)
    assert printed == "0 0\nanswer answer\n"


def test_a_forked_child_may_close_and_drop_what_it_inherited():
    """Also when some thread of the parent held the channel's lock at that moment: the child has it for ever."""
    printed = forking("""
        worker = fake_worker("answer")
        held, done = threading.Event(), threading.Event()
        def hold():
            with worker._channel._changed:
                held.set()
                done.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()

        def let_go():
            global worker
            worker.close()
            asyncio.run(worker.aclose())
            del worker
            gc.collect()
            return True

        print(in_child(let_go))
        done.set()
        holder.join()
        print(worker.generate("x").text)
    """)
    assert printed == "0\nanswer\n"


@pytest.mark.engine
def test_a_forked_child_opens_a_worker_of_its_own(tiny_llama: Path):
    """Through the registry and through a handle that the parent has used; it waits for nobody who leaves the parent."""
    printed = forking(
        """
        from concurrent.futures import Future
        from llama_worker import _exit

        config = ModelConfig(model=sys.argv[1], n_ctx=512, n_threads=1)
        handle = get_handle(config)
        worker = handle.worker()
        ask = lambda worker: worker.generate("hello", max_tokens=4, temperature=0).text
        said = ask(worker)

        _exit.leaves(Future())
        began = time.monotonic()

        def has_its_own():
            own = get_worker(config)
            is_its_own = own is not worker and handle.worker() is own and ask(own) == said
            return is_its_own and time.monotonic() - began < _exit.LONGEST_FAREWELL

        print(in_child(has_its_own), ask(worker) == said, handle.worker() is worker)
        """,
        str(tiny_llama),
    )
    assert printed == "0 True True\n"
