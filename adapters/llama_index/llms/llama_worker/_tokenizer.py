"""Tokenizer: a model's own tokenizer for `Settings.tokenizer`, node parsers, memories and token counters."""

from __future__ import annotations

from functools import lru_cache

from llama_index.llms.llama_worker._component import WorkerComponent

from llama_worker import LlamaWorker

_LONGEST_KEPT = 1_000  # characters; LlamaIndex repeats short texts, and keeping whole documents would cost memory


class Tokenizer:
    """`tokenizer(text)` gives the ids of plain text, without BOS. Any thread.

    LlamaIndex calls its tokenizer thousands of times for one page, some of them on the event loop. No
    call passes through the worker's queue or waits for a generation; the first may wait for the model to
    load. Follows its worker through reloads, and pickles with the component that made it.
    """

    def __init__(self, component: WorkerComponent) -> None:
        self._component = component
        self._worker: LlamaWorker | None = None
        self._remembered = lru_cache(maxsize=4096)(self._tokenize)

    def __call__(self, text: str) -> list[int]:
        digest = self._attached().info.digest
        tokenize = self._tokenize if len(text) > _LONGEST_KEPT else self._remembered
        return list(tokenize(digest, text))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[WorkerComponent]]:
        return Tokenizer, (self._component,)

    def _attached(self) -> LlamaWorker:
        if self._worker is None or self._worker.is_closed:
            self._worker = self._component._connect()
        return self._worker

    def _tokenize(self, digest: str, text: str) -> tuple[int, ...]:
        # The digest is there for the cache alone: another model has other tokens.
        return tuple(self._attached().tokenize(text))
