"""The clock: one way to time a stream, eight streams and the agents, whoever produces the text."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from benchmarks import workload
from benchmarks.workload import Agents, ChatMessage, Generation

Pieces: TypeAlias = Generator[str, None, int]
"""Yields pieces of text as they arrive and returns the number of tokens that were sampled."""
Complete: TypeAlias = Callable[[str, int], Pieces]
"""(prompt, n_tokens): greedy raw completion that ignores the end of generation."""
Chat: TypeAlias = Callable[[Sequence[ChatMessage], int], Pieces]
"""(messages, n_tokens): the same through the model's chat template."""
Job: TypeAlias = Callable[[], object]
Figures: TypeAlias = dict[str, float]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One stream as its reader saw it; times in seconds of perf_counter."""

    asked: float
    first: float
    last: float
    tokens: int
    text: str

    @property
    def ttft(self) -> float:
        return self.first - self.asked


def listen(pieces: Pieces, n_tokens: int) -> Heard:
    """Read a stream to its end. Raises AssertionError unless exactly `n_tokens` were sampled."""
    asked, first, text, tokens = time.perf_counter(), 0.0, [], -1

    def counted() -> Iterator[str]:
        nonlocal tokens
        tokens = yield from pieces

    for piece in counted():
        if piece:
            first = first or time.perf_counter()
            text.append(piece)
    last = time.perf_counter()
    assert tokens == n_tokens, f"{tokens} tokens instead of {n_tokens}"
    return Heard(asked=asked, first=first, last=last, tokens=tokens, text="".join(text))


def one_stream(complete: Complete) -> Figures:
    """Decode rate: from the first piece to the end there are n_decodes steps."""
    work = workload.ONE_STREAM
    listen(complete(workload.story(8, seed=99), 8), 8)
    heard = listen(complete(work.prompts()[0], work.n_tokens), work.n_tokens)
    return {"tok_s": work.n_decodes / (heard.last - heard.first), "ttft_s": heard.ttft, "tokens": heard.tokens}


def schema(free: Complete, constrained: Complete) -> Figures:
    """Rates of the same number of tokens, free and held to a JSON schema, in turn; prompts are cached for both."""
    work = workload.SCHEMA
    prompt = work.prompts()[0]

    def rate(complete: Complete) -> float:
        heard = listen(complete(prompt, work.n_tokens), work.n_tokens)
        assert complete is free or heard.text.lstrip().startswith("["), "the schema was not kept"
        return work.n_tokens / (heard.last - heard.asked)

    _warm, *pairs = [(rate(free), rate(constrained)) for _ in range(workload.SCHEMA_ROUNDS + 1)]
    medians = [statistics.median(rates) for rates in zip(*pairs, strict=True)]
    return {"free_tok_s": medians[0], "schema_tok_s": medians[1], "tokens": work.n_tokens}


def eight_streams(complete: Complete, *, serial: bool = False) -> Figures:
    """Rate over the whole, prefill included. n_decodes tokens a stream are counted, as llama-batched-bench does."""
    work = workload.EIGHT_STREAMS
    listen(complete(workload.story(8, seed=99), 8), 8)
    heard, wall = _all_streams(complete, work, serial=serial)
    return {"tok_s": work.streams * work.n_decodes / wall, "wall_s": wall, "tokens": sum(h.tokens for h in heard)}


def streams_at_once(complete: Complete, work: Generation) -> Figures:
    """As `eight_streams`, for any Generation and without the warm-up."""
    _, wall = _all_streams(complete, work, serial=False)
    return {"tok_s": work.streams * work.n_decodes / wall}


def agents(chat: Chat, work: Agents) -> Figures:
    """Agents over one system prompt, each on its own thread, its replies in its history."""
    warm_up = [ChatMessage(role="user", content="hello")]
    listen(chat(warm_up, 8), 8)
    began = time.perf_counter()
    sessions = in_threads([lambda agent=agent: _session(chat, agent, work) for agent in range(work.agents)])
    wall = time.perf_counter() - began
    turns = [heard for session in sessions for heard in session]
    ttft = sum(heard.ttft for heard in turns) / len(turns)
    return {"wall_s": wall, "ttft_s": ttft, "tokens": sum(heard.tokens for heard in turns)}


def in_threads(jobs: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Run every job on its own thread, at once; the first failure is raised after all have ended."""
    results: list[_Result | BaseException | None] = [None] * len(jobs)

    def run(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as failure:  # noqa: BLE001 - handed to the caller below
            results[index] = failure

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def fingerprint(vectors: Sequence[Sequence[float]]) -> float:
    """One number that near-equal embeddings share: each vector, at length 1, projected on a fixed direction."""
    return sum(_projection(vector) for vector in vectors) / len(vectors)


def _projection(vector: Sequence[float]) -> float:
    length = math.sqrt(sum(x * x for x in vector))
    return sum(x * math.cos(i) for i, x in enumerate(vector)) / length


def _all_streams(complete: Complete, work: Generation, *, serial: bool) -> tuple[list[Heard], float]:
    jobs = [lambda prompt=prompt: listen(complete(prompt, work.n_tokens), work.n_tokens) for prompt in work.prompts()]
    began = time.perf_counter()
    heard = [job() for job in jobs] if serial else in_threads(jobs)
    return heard, time.perf_counter() - began


def _session(chat: Chat, agent: int, work: Agents) -> list[Heard]:
    messages, turns = [work.system_message()], []
    for turn in range(work.turns):
        messages.append(workload.user_message(agent, turn))
        heard = listen(chat(messages, workload.TURN_TOKENS), workload.TURN_TOKENS)
        messages.append({"role": "assistant", "content": heard.text})
        turns.append(heard)
    return turns
