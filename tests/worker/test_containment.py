"""A native crash on a worker's thread parks that thread: everyone is answered and the process lives on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from llama_worker import ConfigError, WorkerConfig
from llama_worker._parking import guarded, park_if_guarded

KINDS = {
    "failed_assertion": "llama-sampler.cpp",
    "failed_assertion_with_the_gil": "llama-sampler.cpp",
    "uncaught_exception": "an uncaught C++ exception",
    "failed_assertion_on_a_native_thread": "ggml-backend.cpp",
}


def crash_under_load(kind: str, model: Path, contain: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.worker.crash_under_load", kind, str(model), contain]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.engine
@pytest.mark.parametrize("kind", KINDS)
def test_everyone_is_answered_within_five_seconds_and_a_new_worker_serves(tiny_llama: Path, kind: str):
    """Running, waiting, queued and embedding callers, those before the full channel, and a reload."""
    done = crash_under_load(kind, tiny_llama, "contain")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report["ends"]) == report["callers"] == 18
    for name, (end, seconds) in report["ends"].items():
        assert end.startswith("WorkerDied: llama.cpp crashed"), (name, end)
        assert KINDS[kind] in end
        assert seconds < 5, name
    assert (report["state"], report["running"], report["afterwards"]) == ("dead", 0, 8)


@pytest.mark.engine
@pytest.mark.parametrize("kind", KINDS)
def test_without_containment_the_same_crash_ends_the_process(tiny_llama: Path, kind: str):
    done = crash_under_load(kind, tiny_llama, "leave")
    assert done.returncode == -signal.SIGABRT
    assert done.stdout == ""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


LOADING = """
    import sys
    from llama_worker import LlamaWorker, ModelConfig, ModelLoadError, WorkerConfig
    from llama_worker._engine.library import library
    from llama_worker._engine.llama import load

    def crashing(config):
        if config.n_ctx == 512:
            library().api._lib.ggml_backend_buft_name(None)
        return load(config)

    def opened(n_ctx):
        config = ModelConfig(model=sys.argv[1], n_ctx=n_ctx, n_threads=1)
        return LlamaWorker(config, WorkerConfig(contain_crashes=True), loader=crashing)

    try:
        opened(512)
    except ModelLoadError as error:
        print("first:", error)
    worker = opened(1024)
    for overlap in (False, True):
        try:
            worker.reload(n_ctx=512, overlap=overlap)
        except ModelLoadError as error:
            print("reload:", error.previous_restored, error)
        print("serves:", worker.generate("x", max_tokens=4, ignore_eos=True).usage.completion_tokens)
    worker.close()
"""


@pytest.mark.engine
def test_a_crash_while_loading_is_a_load_error_and_the_former_model_serves_on(tiny_llama: Path):
    done = run(LOADING, tiny_llama)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *reloads = done.stdout.splitlines()
    assert first.startswith("first: llama.cpp crashed while it loaded the model: ggml/src/ggml-backend.cpp")
    assert [line.split(" llama.cpp")[0] for line in reloads] == ["reload: True", "serves: 4"] * 2


FREEING = """
    import sys
    from dataclasses import replace
    from llama_worker import LlamaWorker, ModelConfig, WorkerConfig
    from llama_worker._engine.library import library
    from llama_worker._engine.llama import load

    class CrashingAtTheEnd:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def close(self):
            library().api._lib.ggml_backend_buft_name(None)

    def crashing(config):
        loaded = load(config)
        return replace(loaded, engine=CrashingAtTheEnd(loaded.engine))

    config = ModelConfig(model=sys.argv[1], n_ctx=512, n_threads=1)
    worker = LlamaWorker(config, WorkerConfig(contain_crashes=True), loader=crashing)
    worker.close()
    print(worker.status().state)
"""


@pytest.mark.engine
def test_close_does_not_wait_for_a_thread_that_crashed_while_it_freed_the_model(tiny_llama: Path):
    done = run(FREEING, tiny_llama)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr[-2000:]


ELSEWHERE = """
    import sys, threading
    from llama_worker import LlamaWorker, ModelConfig, WorkerConfig
    from llama_worker._engine.library import library

    config = ModelConfig(model=sys.argv[1], n_ctx=512, n_threads=1)
    worker = LlamaWorker(config, WorkerConfig(contain_crashes=True))
    api = library().api
    crash = {
        "assertion": lambda: api._lib.ggml_backend_buft_name(None),
        "exception": lambda: api.llama_vocab_get_text(worker._service.loaded.view.vocabulary._vocab, 10**6),
    }[sys.argv[2]]
    thread = threading.Thread(target=crash)
    thread.start()
    thread.join()
"""


@pytest.mark.engine
@pytest.mark.parametrize("what", ["assertion", "exception"])
def test_a_crash_on_a_thread_of_the_applications_ends_the_process_as_ever(tiny_llama: Path, what: str):
    """Were it parked, whoever waits for it would wait for ever and nobody could say why."""
    done = run(ELSEWHERE, tiny_llama, what)
    assert done.returncode == -signal.SIGABRT
    assert "GGML_ASSERT(buft) failed" in done.stderr or what == "exception"


LEAVING = """
    import sys, threading, time
    from llama_worker import LlamaWorker, ModelConfig, WorkerConfig, WorkerDied
    from llama_worker._engine.library import library
    from llama_worker._engine.llama import LlamaEngine

    def crash(self, spans):
        library().api._lib.ggml_abort(b"somewhere.cpp", 1, b"on purpose")

    config = ModelConfig(model=sys.argv[1], n_ctx=512, n_threads=1)
    worker = LlamaWorker(config, WorkerConfig(contain_crashes=True))
    LlamaEngine.decode = crash
    try:
        worker.generate("x")
    except WorkerDied as error:
        print(error)
"""


@pytest.mark.engine
def test_the_interpreter_leaves_with_status_0_although_a_thread_is_parked(tiny_llama: Path):
    done = run(LEAVING, tiny_llama)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("llama.cpp crashed: somewhere.cpp:1: on purpose; its thread and")


def test_a_thread_that_nobody_guards_is_not_parked():
    park_if_guarded("nothing happened", strays=True)
    guarded(lambda: None)()
    park_if_guarded("the guard has ended", strays=True)
    nested = guarded(lambda: guarded(threading.get_ident)())
    assert nested() == threading.get_ident()
    park_if_guarded("also after a nested one", strays=True)


def test_containment_is_off_unless_asked_for():
    assert WorkerConfig().contain_crashes is False
    assert WorkerConfig().step_timeout is None
    with pytest.raises(ConfigError, match="step_timeout"):
        WorkerConfig(step_timeout=0)
