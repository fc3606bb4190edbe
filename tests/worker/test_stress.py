"""Many threads and event loops on one worker, on the real engine: all answered once, and rightly.

The numeric tier: each emitted token is scored by one cold pass over the whole sequence. Its logit may
fall short of the best by rounding only (0.05); an injected error costs more than 0.2.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llama_worker import (
    AsyncEventStream,
    EventStream,
    Failed,
    Finished,
    LlamaWorker,
    ModelConfig,
    StreamEvent,
    TextDelta,
    WorkerConfig,
)
from llama_worker._engine.base import DecodeStatus, Span
from llama_worker._engine.llama import load
from llama_worker.testing import assert_well_formed
from tests.worker.waiting import wait_until

pytestmark = pytest.mark.engine

N_THREADS, N_EACH, N_LOOPS = 64, 8, 4
TOLERANCE = 0.05
SYSTEMS = ["You are terse. " * 8, "You are a poet of the sea. " * 6, ""]


@dataclass(slots=True)
class Case:
    """One request of the stress, and what came of it."""

    prompt: str
    max_tokens: int
    cancel_after: int | None
    events: list[StreamEvent]


def cases_of(rng: random.Random, n: int) -> list[Case]:
    def case() -> Case:
        prompt = rng.choice(SYSTEMS) + "x" * rng.randrange(1, 60) + f" question {rng.randrange(20)}"
        cancel_after = rng.randrange(0, 8) if rng.random() < 1 / 3 else None
        return Case(prompt, rng.randrange(1, 24), cancel_after, [])

    return [case() for _ in range(n)]


def ask(worker: LlamaWorker, case: Case) -> None:
    read(worker.stream(case.prompt, max_tokens=case.max_tokens, temperature=0.0, logprobs=0), case)


def read(stream: EventStream, case: Case) -> None:
    for event in stream:
        case.events.append(event)
        if case.cancel_after is not None and len(case.events) > case.cancel_after:
            stream.close()


async def aask(worker: LlamaWorker, case: Case) -> None:
    await aread(worker.astream(case.prompt, max_tokens=case.max_tokens, temperature=0.0, logprobs=0), case)


async def aread(stream: AsyncEventStream, case: Case) -> None:
    async for event in stream:
        case.events.append(event)
        if case.cancel_after is not None and len(case.events) > case.cancel_after:
            stream.close()


def storm(worker: LlamaWorker, cases: Sequence[Case]) -> list[BaseException]:
    """Two thirds of the cases from threads, a third from event loops, all at once."""
    errors: list[BaseException] = []
    cut = len(cases) * 2 // 3

    def guard(task: object, *args: object) -> None:
        try:
            task(*args)  # type: ignore[operator]
        except BaseException as exc:  # noqa: BLE001  the test shows it
            errors.append(exc)

    def in_thread(part: Sequence[Case]) -> None:
        for case in part:
            ask(worker, case)

    def in_loop(part: Sequence[Case]) -> None:
        async def run() -> None:
            await asyncio.gather(*[aask(worker, case) for case in part])

        asyncio.run(run())

    parts = [(in_thread, cases[:cut][i::N_THREADS]) for i in range(N_THREADS)]
    parts += [(in_loop, cases[cut:][i::N_LOOPS]) for i in range(N_LOOPS)]
    threads = [threading.Thread(target=guard, args=(task, part)) for task, part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not any(thread.is_alive() for thread in threads), "somebody hangs"
    return errors


def test_sixty_four_threads_and_four_loops_are_all_answered_rightly(tiny_llama: Path):
    check_storm(ModelConfig(model=str(tiny_llama), n_ctx=2048, n_parallel=8, n_threads=1), n=N_THREADS * N_EACH)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_the_same_storm_on_smollm2(smollm2_f32: Path):
    """Its weights as F32: quantised ones make the kernels round activations, each batch shape in its own way.

    That alone is worth 0.3 on this model, far more than the tier allows for.
    """
    check_storm(ModelConfig(model=str(smollm2_f32), n_ctx=2048, n_parallel=8, n_threads=1), n=N_THREADS * N_EACH)


def check_storm(config: ModelConfig, n: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    cases = cases_of(random.Random(seed), n)
    with LlamaWorker(config, WorkerConfig(queue_size=32)) as worker:
        errors = storm(worker, cases)
        assert not errors, f"seed {seed}: {errors[:3]}"
        loaded = worker._service.loaded
        assert loaded is not None
        # The last word comes before the slot is given back.
        wait_until(lambda: not worker.status().running)
        assert (worker.status().waiting, worker.status().queued) == (0, 0)
        loaded.scheduler.cache.check()
        view = worker._view()
        prompts = [view.prompt_tokens(case.prompt) for case in cases]
    ends = [assert_well_formed(case.events) for case in cases]
    assert not [end for end in ends if isinstance(end, Failed)], f"seed {seed}"
    for case, end in zip(cases, ends, strict=True):
        assert isinstance(end, Finished)
        assert end.usage.completion_tokens <= case.max_tokens
        assert end.reason != "cancelled" or case.cancel_after is not None
    worst = max(regrets(config, prompts, ends))
    assert worst <= TOLERANCE, f"seed {seed}: an emitted token falls short by {worst}"


def test_the_score_finds_an_answer_that_was_given_to_another_prompt(tiny_llama: Path):
    """The measure itself can fail: tokens of one prompt, scored behind another, fall short by far."""
    config = ModelConfig(model=str(tiny_llama), n_ctx=2048, n_parallel=8, n_threads=1)
    with LlamaWorker(config) as worker:
        replies = [worker.generate(f"prompt {i}", max_tokens=12, temperature=0.0, logprobs=0) for i in range(2)]
        prompts = [worker._view().prompt_tokens(f"prompt {i}") for i in range(2)]
    ends = [Finished(reason="length", text=reply.text, usage=reply.usage, logprobs=reply.logprobs) for reply in replies]
    assert max(regrets(config, prompts, ends)) <= 0.05
    assert max(regrets(config, prompts[::-1], ends)) > 0.2


def regrets(config: ModelConfig, prompts: Sequence[np.ndarray], ends: Sequence[Finished | Failed]) -> list[float]:
    """For each emitted token: the best logit of a cold pass minus the emitted token's."""
    engine = load(config).engine
    found = [0.0]
    try:
        for prompt, end in zip(prompts, ends, strict=True):
            assert isinstance(end, Finished)
            found += cold_regrets(engine, prompt, [logprob.token for logprob in end.logprobs])
    finally:
        engine.close()
    return found


def cold_regrets(engine, prompt: np.ndarray, emitted: Sequence[int]) -> list[float]:  # type: ignore[no-untyped-def]
    engine.seq_clear(0)
    tokens, position, found = prompt, 0, []
    for token in emitted:
        assert engine.decode([Span(0, position, tokens, True)]) is DecodeStatus.OK
        logits = engine.logits(len(tokens) - 1)
        found.append(float(logits.max() - logits[token]))
        position += len(tokens)
        tokens = np.array([token], np.int32)
    return found


def test_text_deltas_join_to_what_the_tokens_say(tiny_llama: Path):
    with LlamaWorker(ModelConfig(model=str(tiny_llama), n_ctx=1024, n_threads=1)) as worker:
        events = list(worker.stream("hello", max_tokens=40, temperature=1.0, seed=5, logprobs=2, ignore_eos=True))
        end = assert_well_formed(events)
        assert isinstance(end, Finished)
        assert worker.detokenize([item.token for item in end.logprobs]) == end.text
        assert sum((event.logprobs for event in events if isinstance(event, TextDelta)), ()) == end.logprobs
        assert all(len(item.top) == 2 and item.top[0][2] >= item.top[1][2] for item in end.logprobs)
