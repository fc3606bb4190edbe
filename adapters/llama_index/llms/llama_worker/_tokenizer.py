"""Tokenizer: a model's own tokenizer for `Settings.tokenizer`, node parsers, memories and token counters."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from llama_index.llms.llama_worker._component import WorkerComponent

_LONGEST_KEPT = 1_000  # characters; LlamaIndex repeats short texts, and keeping whole documents would cost memory


class Tokenizer:
    """`tokenizer(text)` gives the ids of plain text, without BOS. Any thread.

    LlamaIndex calls its tokenizer thousands of times for one page, some of them on the event loop. No
    call passes through the worker's queue or waits for a generation; the first may wait for the model to
    load. Pickles with the component that made it.
    """

    def __init__(self, component: WorkerComponent) -> None:
        self._component = component
        self._remembered = _remembering(self._tokenize)

    def __call__(self, text: str) -> list[int]:
        if len(text) > _LONGEST_KEPT:
            return list(self._tokenize(text))
        return list(self._remembered(text))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[WorkerComponent]]:
        return Tokenizer, (self._component,)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self._component._connect().tokenize(text))


def _remembering(tokenize: Callable[[str], tuple[int, ...]]) -> Callable[[str], tuple[int, ...]]:
    return lru_cache(maxsize=4096)(tokenize)
