"""xllamacpp: llama-server's engine in process, called through its Python API."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Sequence
from typing import Any

import xllamacpp

from benchmarks import drive, workload
from benchmarks.contestants.command import main
from benchmarks.drive import Figures, Pieces
from benchmarks.workload import ChatMessage


class InProcess:
    """One xllamacpp.Server. Its calls block and hand chunks to a callback, so each stream has a thread."""

    def __init__(self, model: str, threads: str, *, n_ctx: int, slots: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_parallel, params.kv_unified = n_ctx, slots, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
        params.port = 0
        self._server = xllamacpp.Server(params)

    def chat(self, messages: Sequence[ChatMessage], n_tokens: int) -> Pieces:
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        asked = {"messages": list(messages), "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True} | usage
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(asked, events)).start()
        tokens = 0
        while (event := events.get()) is not None:
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""
        return tokens

    def _run(self, asked: dict[str, Any], events: queue.SimpleQueue[Any]) -> None:
        try:
            self._server.handle_chat_completions(asked, lambda chunk: _put_all(chunk, events))
        finally:
            events.put(None)


def _put_all(chunk: Any, events: queue.SimpleQueue[Any]) -> None:
    chunk = json.loads(chunk) if isinstance(chunk, str | bytes) else chunk
    for event in chunk if isinstance(chunk, list) else [chunk]:
        events.put(event)


def agents(model: str, threads: str, variant: str) -> Figures:
    work = workload.AGENTS[variant]
    return drive.agents(InProcess(model, threads, n_ctx=work.n_ctx, slots=work.agents).chat, work)


if __name__ == "__main__":
    main({"agents": agents})
