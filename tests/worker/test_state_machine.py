"""Random sequences of calls of the public API, on the real engine: typed errors only, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from llama_worker import (
    ContextOverflowError,
    DeadlineExceeded,
    EventStream,
    Failed,
    InvalidRequestError,
    LlamaWorker,
    LlamaWorkerError,
    ModelConfig,
    ModelLoadError,
    RequestError,
    StreamEvent,
    WorkerClosed,
    WorkerConfig,
    cancel_scope,
)
from llama_worker.testing import assert_well_formed
from tests import synth
from tests.worker.waiting import in_thread

pytestmark = pytest.mark.engine

N = 500 if os.environ.get("LLAMA_WORKER_PROOF") else 50
N_CTX = 512
PROMPTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text(max_size=20).map(lambda text: [{"role": "user", "content": text}]),
    st.sampled_from(["x" * 2000, "the " * 100, "<|im_end|>", "\0", "a\ud800b"]),
    st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=4).map(
        lambda roles: [{"role": role, "content": f"turn {i}"} for i, role in enumerate(roles)]
    ),
)
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 24)},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 100.0]),
        "top_k": st.integers(0, 600),
        "top_p": st.floats(0, 1),
        "min_p": st.floats(0, 1),
        "seed": st.integers(0, 2**32 - 2),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "logprobs": st.integers(0, 5),
        "ignore_eos": st.booleans(),
        "mirostat": st.integers(0, 2),
        "repeat_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(st.integers(-1, 600), st.sampled_from([-math.inf, -5.0, 5.0]), max_size=3),
        "timeout": st.sampled_from([0.001, 0.02, 30.0]),
    },
)
BAD_SAMPLING = st.sampled_from(
    [
        {"max_tokens": 0},
        {"temperature": math.nan},
        {"top_p": 1.5},
        {"stop": ""},
        {"seed": -1},
        {"timeout": 0},
        {"no_such": 1},
        {"logit_bias": {10**9: 1.0}},
    ]
)
ACCEPTED = (RequestError, DeadlineExceeded)


@dataclass(eq=False)
class Asked:
    """A stream, if the request was accepted, and what was read of it."""

    stream: EventStream | None
    events: list[StreamEvent] = field(default_factory=list)


class Calls(RuleBasedStateMachine):
    """One worker at a time, its streams, and whatever comes to a caller's mind."""

    streams = Bundle("streams")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.models = [folder / "a.gguf", folder / "b.gguf"]

    @initialize()
    def open(self) -> None:
        self.worker = self._opened()

    def _opened(self) -> LlamaWorker:
        config = ModelConfig(model=str(self.models[0]), n_ctx=N_CTX, n_parallel=2, n_threads=1)
        return LlamaWorker(config, WorkerConfig(queue_size=64))

    def _bounded(self, call: Callable[[], Any], *accepted: type[Exception]) -> Any:
        """The call's value, or its error if that is one of those; in any case within a minute."""
        outcome = in_thread(call)()
        if isinstance(outcome, BaseException) and not isinstance(outcome, (*accepted, *ACCEPTED)):
            raise outcome
        return outcome

    # -- asking -------------------------------------------------------------------------------------

    @rule(prompt=PROMPTS, sampling=SAMPLING)
    def generate(self, prompt: Any, sampling: dict[str, Any]) -> None:
        reply = self._bounded(lambda: self.worker.generate(prompt, **sampling))
        if not isinstance(reply, Exception):
            assert reply.usage.completion_tokens <= sampling["max_tokens"]
            assert reply.finish_reason in ("stop", "length")

    @rule(prompt=PROMPTS, sampling=SAMPLING)
    def agenerate(self, prompt: Any, sampling: dict[str, Any]) -> None:
        self._bounded(lambda: asyncio.run(self.worker.agenerate(prompt, **sampling)))

    @rule(target=streams, prompt=PROMPTS, sampling=SAMPLING)
    def stream(self, prompt: Any, sampling: dict[str, Any]) -> Any:
        outcome = self._bounded(lambda: self.worker.stream(prompt, **sampling))
        return Asked(outcome if isinstance(outcome, EventStream) else None)

    @rule(asked=streams, n=st.integers(1, 5))
    def read_some(self, asked: Asked, n: int) -> None:
        if (stream := asked.stream) is not None:
            for _ in range(n):
                event = self._bounded(lambda: next(stream, None))
                asked.events += [] if event is None else [event]

    @rule(asked=streams)
    def cancel(self, asked: Asked) -> None:
        if asked.stream is not None:
            asked.stream.close()

    @rule(asked=consumes(streams))
    def read_the_rest(self, asked: Asked) -> None:
        if (stream := asked.stream) is not None:
            end = assert_well_formed(asked.events + self._bounded(lambda: list(stream)))
            assert not isinstance(end, Failed) or isinstance(end.error, LlamaWorkerError), end

    @rule(asked=consumes(streams))
    def drop(self, asked: Asked) -> None:
        del asked
        gc.collect()

    @rule(prompt=PROMPTS, n=st.integers(0, 3))
    def generate_in_a_cancelled_scope(self, prompt: Any, n: int) -> None:
        def ask() -> None:
            with cancel_scope() as scope:
                stream = self.worker.stream(prompt, max_tokens=50)
                for _ in range(n):
                    next(stream, None)
                scope.cancel()
                list(stream)

        self._bounded(ask)

    @rule(texts=st.lists(st.text(max_size=30), max_size=4), overlong=st.sampled_from(["error", "truncate"]))
    def embed(self, texts: list[str], overlong: Any) -> None:
        vectors = self._bounded(lambda: self.worker.embed(texts, overlong=overlong))
        if not isinstance(vectors, Exception):
            assert len(vectors) == len(texts)

    @rule(text=st.text(max_size=60))
    def tokenize(self, text: str) -> None:
        ids = self._bounded(lambda: self.worker.tokenize(text))
        if not isinstance(ids, Exception):
            assert self._bounded(lambda: self.worker.detokenize(ids)).strip() == text.strip()

    @rule(ids=st.lists(st.integers(-5, 700), max_size=10))
    def detokenize(self, ids: list[int]) -> None:
        self._bounded(lambda: self.worker.detokenize(ids))

    @rule(bad=BAD_SAMPLING)
    def ask_badly(self, bad: dict[str, Any]) -> None:
        outcome = self._bounded(lambda: self.worker.generate("hello", **{"max_tokens": 2, **bad}))
        assert isinstance(outcome, InvalidRequestError), bad

    @rule()
    def ask_too_much(self) -> None:
        outcome = self._bounded(lambda: self.worker.generate("x" * 3000, max_tokens=2))
        assert isinstance(outcome, ContextOverflowError)

    # -- the worker ---------------------------------------------------------------------------------

    @rule(which=st.integers(0, 1), when=st.sampled_from(["drain", "now"]), overlap=st.booleans())
    def reload(self, which: int, when: Any, overlap: bool) -> None:
        model = str(self.models[which])
        self._bounded(lambda: self.worker.reload(model=model, when=when, timeout=5, overlap=overlap))
        assert self.worker.config.model == model

    @rule(name=st.sampled_from(["bad.gguf", "missing.gguf"]), overlap=st.booleans())
    def reload_badly(self, name: str, overlap: bool) -> None:
        before = self.worker.config
        bad = str(self.folder / name)
        outcome = self._bounded(lambda: self.worker.reload(model=bad, overlap=overlap), ModelLoadError)
        assert isinstance(outcome, ModelLoadError)
        assert self.worker.config == before

    @rule()
    def cancel_all(self) -> None:
        self.worker.cancel_all()

    @rule()
    def close_and_open_again(self) -> None:
        self._bounded(self.worker.close)
        assert self.worker.is_closed
        assert isinstance(self._bounded(lambda: self.worker.generate("hello"), WorkerClosed), WorkerClosed)
        self.worker = self._opened()

    @invariant()
    def it_lives(self) -> None:
        if hasattr(self, "worker"):
            assert self.worker.status().state in ("ready", "draining", "loading")
            repr(self.worker)

    def teardown(self) -> None:
        if hasattr(self, "worker"):
            try:
                reply = self._bounded(lambda: self.worker.generate("goodbye", max_tokens=2, ignore_eos=True))
                assert reply.usage.completion_tokens == 2
            finally:
                self._bounded(self.worker.close)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that serve, and one that does not: `a.gguf`, `b.gguf`, `bad.gguf`. Nobody writes to them."""
    folder = tmp_path_factory.mktemp("models")
    whole = synth.llama(folder / "a.gguf")
    synth.llama(folder / "b.gguf", n_vocab=400)
    (folder / "bad.gguf").write_bytes(whole.read_bytes()[:100_000])
    return folder


@pytest.mark.timeout(1500)
def test_no_sequence_of_calls_breaks_the_worker(folder: Path):
    run_state_machine_as_test(
        lambda: Calls(folder),
        settings=settings(
            max_examples=N,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )
