"""Leaving the interpreter while llama.cpp is at work: at once, with status 0 and without a word."""

import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

PATIENCE = 2.0  # seconds from the end of the program to the end of the process

PRELUDE = """
    import logging, sys, threading, time
    from llama_worker import *
    from tests.worker.waiting import wait_until

    ENDLESS = dict(ignore_eos=True, max_tokens=4000)
    config = ModelConfig(model=sys.argv[1], n_ctx=8192, n_parallel=4, n_threads=1)

"""

STATES = {
    "loading": """
        worker = get_worker(config)
        assert worker.status().state == "loading"
    """,
    "a long prefill": """
        worker = get_worker(config)
        stream = worker.stream("hello " * 4000, **ENDLESS)
        wait_until(lambda: worker.status().steps and worker.status().running)
    """,
    "a reload that drains": """
        def reload():
            try:
                worker.reload(n_ctx=4096)
            except WorkerClosed:
                pass

        worker = get_worker(config)
        stream = worker.stream("hello", **ENDLESS)
        next(stream)
        threading.Thread(target=reload, daemon=True).start()
        wait_until(lambda: worker.status().state == "draining")
    """,
    **{
        f"a reload that reads weights, {how}": f"""
        def reload():
            try:
                worker.reload(n_ctx=4096, overlap={overlap}, progress=slowly)
            except WorkerClosed:
                pass

        def slowly(fraction):
            reading.set()
            time.sleep(0.3)

        worker, reading = get_worker(config), threading.Event()
        worker.generate("hello", max_tokens=1)
        threading.Thread(target=reload, daemon=True).start()
        assert reading.wait(30)
        wait_until(lambda: worker.status().state == {state!r})
        """
        for how, overlap, state in (("alone", False, "loading"), ("beside the old model", True, "ready"))
    },
    "streams half read, of adapters and of workers that nobody closed": """
        from langchain_llama_worker import ChatLlamaWorker, LlamaWorkerEmbeddings
        from llama_index.llms.llama_worker import LlamaWorkerLLM

        settings = dict(model=sys.argv[1], n_ctx=8192, n_threads=1)
        chat, llm = ChatLlamaWorker(**settings, **ENDLESS), LlamaWorkerLLM(**settings, **ENDLESS)
        embeddings = LlamaWorkerEmbeddings(**{**settings, "n_ctx": 256})
        pieces, answer = chat.stream("hello"), llm.stream_complete("hello")
        next(pieces), next(answer), embeddings.embed_query("hello")

        left_open = LlamaWorker(config).stream("hello", **ENDLESS)
        next(left_open)
    """,
    "a parked native thread, another worker at work": """
        from llama_worker._engine.library import library
        from llama_worker._engine.llama import load

        def crashing(config):
            library().api._lib.ggml_backend_buft_name(None)  # GGML_ASSERT

        logging.getLogger("llama_worker").addHandler(logging.NullHandler())  # that it crashed is said there
        try:
            LlamaWorker(config, WorkerConfig(contain_crashes=True), loader=crashing)
        except ModelLoadError as error:
            assert "crashed" in str(error)
        assert any(thread.name == "llama-worker-loader" for thread in threading.enumerate())
        stream = LlamaWorker(config).stream("hello", **ENDLESS)
        next(stream)
    """,
}


@pytest.mark.parametrize("state", STATES)
def test_the_interpreter_leaves_at_once(state: str, tiny_llama: Path) -> None:
    last_words = "print(time.monotonic(), open('/proc/self/schedstat').read().split()[1], flush=True)"
    program = textwrap.dedent(PRELUDE) + textwrap.dedent(STATES[state]) + last_words
    process = subprocess.Popen(
        [sys.executable, "-c", program, tiny_llama], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    queued = seconds_queued(process)
    ended = time.monotonic()
    said, complaints = process.communicate()
    assert (process.returncode, complaints) == (0, "")
    began, queued_before = said.split()
    assert ended - float(began) - (queued - int(queued_before) / 1e9) < PATIENCE


def seconds_queued(process: "subprocess.Popen[str]") -> float:
    """Waits for its end. How long its main thread was ready to run and others had the cores: that is not its doing."""
    while True:
        queued = int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1])
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
            return queued / 1e9
