"""llama-worker through its public names, as its users call it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Literal

from benchmarks import drive, workload
from benchmarks.contestants.busy_thread import BusyThread
from benchmarks.contestants.command import main
from benchmarks.drive import Figures, Pieces
from benchmarks.workload import Agents, ChatMessage, Generation
from llama_worker import Failed, Finished, LlamaWorker, ModelConfig, StreamEvent, TextDelta, cancel_scope

GREEDY = {"temperature": 0.0, "ignore_eos": True}


class Worker:
    """A LlamaWorker as `drive` wants it."""

    def __init__(self, worker: LlamaWorker) -> None:
        self._worker = worker

    def complete(self, prompt: str, n_tokens: int) -> Pieces:
        return _pieces(self._worker.stream(prompt, max_tokens=n_tokens, **GREEDY))

    def chat(self, messages: Sequence[ChatMessage], n_tokens: int) -> Pieces:
        return _pieces(self._worker.stream(messages, max_tokens=n_tokens, **GREEDY))

    def whole(self, prompt: str, n_tokens: int) -> Pieces:
        """As `complete`, through generate(): the text comes in one piece."""
        reply = self._worker.generate(prompt, max_tokens=n_tokens, **GREEDY)
        yield reply.text
        return reply.usage.completion_tokens


def _pieces(events: Iterable[StreamEvent]) -> Pieces:
    for event in events:
        match event:
            case TextDelta(text=text):
                yield text
            case Finished(usage=usage):
                return usage.completion_tokens
            case Failed(error=error):
                raise error
    raise AssertionError("the stream had no end")


def one_stream(model: str, threads: str) -> Figures:
    with _open(model, threads, workload.ONE_STREAM) as worker:
        return drive.one_stream(Worker(worker).complete)


def schema(model: str, threads: str) -> Figures:
    form = {"type": "json_schema", "json_schema": workload.RECORDS}

    with _open(model, threads, workload.SCHEMA) as worker:

        def constrained(prompt: str, n_tokens: int) -> Pieces:
            return _pieces(worker.stream(prompt, max_tokens=n_tokens, temperature=0.0, response_format=form))

        return drive.schema(Worker(worker).complete, constrained)


def eight_streams(model: str, threads: str) -> Figures:
    with _open(model, threads, workload.EIGHT_STREAMS) as worker:
        return drive.eight_streams(Worker(worker).complete)


def agents(model: str, threads: str, variant: str) -> Figures:
    """Through LangChain, as ChatLlamaCpp is."""
    from langchain_llama_worker import ChatLlamaWorker

    work = workload.AGENTS[variant]
    with _open_agents(model, threads, work) as worker:
        chat = ChatLlamaWorker(worker=worker, **GREEDY)

        def stream(messages: Sequence[ChatMessage], n_tokens: int) -> Pieces:
            tokens = 0
            for chunk in chat.stream([(m["role"], m["content"]) for m in messages], max_tokens=n_tokens):
                tokens += (chunk.usage_metadata or {}).get("output_tokens", 0)
                yield str(chunk.content)
            return tokens

        return drive.agents(stream, work)


def agents_core(model: str, threads: str, variant: str) -> Figures:
    """The same without LangChain: what the framework costs."""
    work = workload.AGENTS[variant]
    with _open_agents(model, threads, work) as worker:
        return drive.agents(Worker(worker).chat, work)


def embeddings(model: str, threads: str) -> Figures:
    texts = workload.embed_texts()
    with LlamaWorker(ModelConfig(model=model, n_threads=int(threads))) as worker:
        worker.embed(texts[:8])
        began = time.perf_counter()
        vectors = worker.embed(texts)
        wall = time.perf_counter() - began
    assert len(vectors) == len(texts)
    return {"texts_s": len(texts) / wall, "fingerprint": drive.fingerprint(vectors)}


def cancel(model: str, threads: str) -> Figures:
    """Cancel in the middle of a prefill: when does its stream end, when does the next request have its token?"""
    with LlamaWorker(ModelConfig(model=model, n_threads=int(threads))) as worker:
        worker.generate(workload.story(8, seed=99), max_tokens=8, **GREEDY)
        cuts = [_cut(worker, seed, delay) for seed, delay in enumerate(workload.CANCEL_DELAYS)]
    return {name: max(cut[name] for cut in cuts) for name in cuts[0]}


def _cut(worker: LlamaWorker, seed: int, delay: float) -> Figures:
    with cancel_scope() as scope:
        stream = worker.stream(workload.long_prompt(seed), max_tokens=1)
    threading.Event().wait(delay)
    began = time.perf_counter()
    scope.cancel()
    *_, last = stream
    ended = time.perf_counter()
    worker.generate(workload.story(4, seed=200 + seed), max_tokens=1, **GREEDY)
    after = time.perf_counter()
    assert isinstance(last, Finished), last
    assert last.reason == "cancelled", "the prefill was over before the cancel"
    return {"ended_ms": (ended - began) * 1e3, "next_ms": (after - began) * 1e3}


def busy(model: str, threads: str) -> Figures:
    """Decoding alone, then beside a thread that computes in Python: with generate() and with stream()."""
    with _open(model, threads, workload.BUSY) as worker:
        ours = Worker(worker)
        drive.streams_at_once(ours.whole, workload.BUSY)
        alone = {"whole": _rate(ours.whole), "streamed": _rate(ours.complete)}
        with BusyThread():
            beside = {"whole": _rate(ours.whole), "streamed": _rate(ours.complete)}
    return {
        "idle_tok_s": alone["whole"],
        "busy_tok_s": beside["whole"],
        "idle_stream_tok_s": alone["streamed"],
        "busy_stream_tok_s": beside["streamed"],
    }


def two_workers(model: str, threads: str, embedding_model: str) -> Figures:
    """A chat worker and an embedding worker in one process: at once against one after the other."""
    texts, work = workload.embed_texts(), workload.BUSY
    with ExitStack() as stack:
        chat = Worker(stack.enter_context(_open(model, threads, work)))
        embedder = stack.enter_context(LlamaWorker(ModelConfig(model=embedding_model, n_threads=int(threads))))
        generate = _repeated(lambda: drive.streams_at_once(chat.complete, work), 2)
        embed = _repeated(lambda: embedder.embed(texts), 1)
        _wall(generate, embed)
        alone = _wall(generate) + _wall(embed)
        at_once = _wall(generate, embed)
    return {"sum_s": alone, "at_once_s": at_once, "ratio": at_once / alone}


def _repeated(job: drive.Job, times: int) -> drive.Job:
    return lambda: [job() for _ in range(times)]


def _wall(*jobs: drive.Job) -> float:
    began = time.perf_counter()
    drive.in_threads(jobs)
    return time.perf_counter() - began


def _rate(complete: drive.Complete) -> float:
    return drive.streams_at_once(complete, workload.BUSY)["tok_s"]


def speculation(model: str, threads: str) -> Figures:
    """One stream of a text that repeats its prompt, and of one that does not, each with and without drafts."""
    figures: Figures = {}
    with _open(model, threads, workload.COPY, speculation="auto") as worker:
        for name, prompt in (("copy", workload.copied()), ("story", workload.story(200, seed=7))):
            for _ in range(workload.COPY_ROUNDS):  # the first measures what drafts cost
                with_, without = (_copied(worker, prompt, speculate) for speculate in (None, False))
            figures |= {f"{name}_tok_s": with_, f"{name}_plain_tok_s": without}
        figures["acceptance"] = worker.metrics().acceptance or 0.0
    return figures


def _copied(worker: LlamaWorker, prompt: str, speculate: bool | None) -> float:
    began = time.perf_counter()
    reply = worker.generate(prompt, max_tokens=workload.COPY.n_tokens, speculate=speculate, **GREEDY)
    return reply.usage.completion_tokens / (time.perf_counter() - began)


def _open_agents(model: str, threads: str, work: Agents) -> LlamaWorker:
    sizes = {"n_ctx": work.n_ctx, "n_parallel": work.agents}
    return LlamaWorker(ModelConfig(model=model, n_threads=int(threads), speculation="off", **sizes))


def _open(model: str, threads: str, work: Generation, speculation: Literal["auto", "off"] = "off") -> LlamaWorker:
    """Without drafts, unless they are what is measured: peers decode every token by itself too."""
    sizes = {"n_ctx": work.n_ctx, "n_parallel": work.streams}
    return LlamaWorker(ModelConfig(model=model, n_threads=int(threads), speculation=speculation, **sizes))


if __name__ == "__main__":
    main(
        {
            "one_stream": one_stream,
            "eight_streams": eight_streams,
            "schema": schema,
            "agents": agents,
            "agents_core": agents_core,
            "embeddings": embeddings,
            "cancel": cancel,
            "speculation": speculation,
            "busy": busy,
            "two_workers": two_workers,
        }
    )
