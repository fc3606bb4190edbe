"""LoraMetrics: what each LoRA adapter of a worker was used for, and LoraMeter, which counts it.

Counters begin at 0 when the worker starts and go by the adapters' names, whatever is loaded under them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from llama_worker._engine.base import LoraInfo
from llama_worker._record import Answer
from llama_worker._requests import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraMetrics:
    """One adapter: the requests that were answered with it, however, and the sums of their usage.

    `switches`: how often a batch was computed with it after one that was computed with another set. `bytes` are
    those of its matrices in memory; 0 when it is not loaded now.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    switches: int = 0
    bytes: int = 0


class LoraMeter:
    """The counters of one worker's adapters. The mapping is replaced as a whole: any thread may look."""

    def __init__(self) -> None:
        self._counts: Mapping[str, LoraMetrics] = {}
        self._writing = threading.Lock()  # the watchdog answers too, when it has given the worker thread up

    def answered(self, request: GenerationRequest, answer: Answer) -> None:
        """A request is about to be answered. Any thread."""
        usage = answer.usage
        for name, _ in request.loras:
            self._add(
                name,
                LoraMetrics(
                    requests=1,
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                    cached_tokens=usage.cached_tokens,
                ),
            )

    def switched(self, names: Iterable[str]) -> None:
        """The engine computes with these from now on, and did not before."""
        for name in names:
            self._add(name, LoraMetrics(switches=1))

    def snapshot(self, loaded: Mapping[str, LoraInfo]) -> dict[str, LoraMetrics]:
        """Those that are `loaded` now, and those that were used before."""
        counts = self._counts
        names = sorted({*loaded, *counts})
        sizes = {name: info.size for name, info in loaded.items()}
        return {name: replace(counts.get(name, LoraMetrics()), bytes=sizes.get(name, 0)) for name in names}

    def _add(self, name: str, more: LoraMetrics) -> None:
        with self._writing:
            so_far = self._counts.get(name, LoraMetrics())
            sums = {f.name: getattr(so_far, f.name) + getattr(more, f.name) for f in fields(LoraMetrics)}
            self._counts = {**self._counts, name: LoraMetrics(**sums)}
