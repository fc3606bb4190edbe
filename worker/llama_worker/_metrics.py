"""Metrics, CacheMetrics, Distribution: what a worker has done so far, as values that never change.

Counters begin at 0 when the worker starts and never go down, whatever is reloaded. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from llama_worker._events import FinishReason

BOUNDS = tuple(round(mantissa * 10.0**power, 6) for power in range(-4, 3) for mantissa in (1.0, 2.5, 5.0))
"""Upper bounds of the buckets, 0.1 ms to 500 s; one more bucket takes what is longer."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Observed times, counted in buckets: `counts[i]` are at most `bounds[i]`, the last are longer than all."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    sum: float = 0.0
    bounds: tuple[float, ...] = BOUNDS

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None when nothing was observed."""
        return self.sum / self.count if self.count else None

    def quantile(self, q: float) -> float | None:
        """The time that a share `q` of the observations does not exceed, as exactly as the buckets tell.

        None when nothing was observed; what exceeds every bound counts as the highest bound.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q={q}: a quantile is a share from 0 to 1")
        totals = list(accumulate(self.counts))
        if not totals[-1]:
            return None
        rank = q * totals[-1]
        i = next(i for i, total in enumerate(totals) if total and total >= rank)
        if i == len(self.bounds):
            return self.bounds[-1]
        below, low = (totals[i - 1], self.bounds[i - 1]) if i else (0, 0.0)
        return low + (self.bounds[i] - low) * (rank - below) / (self.counts[i] or 1)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Requests that were answered: each by exactly one terminal event, which is counted here.

    Token counts are the sums of those events' `usage`, failed and cancelled ones included. `failed` and
    `embeds_failed` count by the name of the error's class; a cancelled embedding is a GenerationCancelled.
    """

    finished: Mapping[FinishReason, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    embeds: int = 0
    embeds_failed: Mapping[str, int] = field(default_factory=dict)
    embedded_texts: int = 0
    embedded_tokens: int = 0

    @property
    def answered(self) -> int:
        """Every request that was answered, however."""
        return sum(self.finished.values()) + sum(self.failed.values()) + self.embeds + sum(self.embeds_failed.values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the engine was given to decode, for generations.

    `prefill_tokens` and `decode_tokens` are rows of prompts and of replies; what an aborted step computed is
    not in them. `prefill_seconds` and `decode_seconds` are the times of the steps that had such rows: one
    that had both counts for both.
    """

    decodes: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def rows(self) -> int:
        return self.prefill_tokens + self.decode_tokens

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second, all requests together; None before the first."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens of replies a second, all requests together; None before the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Tokens that were guessed and decoded along, and how many of them were then sampled.

    Accepted ones count as `decode_tokens`, with no time between them and the one before; the others count nowhere.
    """

    drafted_tokens: int = 0
    accepted_drafts: int = 0

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that were right; None when nothing was drafted."""
        return self.accepted_drafts / self.drafted_tokens if self.drafted_tokens else None


@dataclass(frozen=True, kw_only=True)
class Metrics(Answered, Work, Drafts):
    """A snapshot of everything that a worker counts.

    `accepted` requests came through the channel, `refused` met QueueFull; `accepted - answered` are under way.
    `queued` requests are in the channel now. `steps` are rounds of the worker thread that had something to
    do. `aborts` are decodes ended by a cancel, `decode_errors` counts every return code but 0 by its name
    (kv_full and aborted are part of normal work), `kv_recoveries` the times that room was made after
    a kv_full, `preemptions` the replies that lost their KV cells for a while. `queue_wait` ends with the
    first slot, `time_to_first_token` with the first row whose logits are sampled; both begin when the
    request is submitted, with the wait for room in the channel. `inter_token` is the time between two such
    rows of one request, `step_time` that of one decode.
    """

    accepted: int
    refused: int
    queued: int
    steps: int
    aborts: int
    decode_errors: Mapping[str, int]
    kv_recoveries: int
    preemptions: int
    reloads: int
    reloads_failed: int
    queue_wait: Distribution
    time_to_first_token: Distribution
    inter_token: Distribution
    step_time: Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMetrics:
    """The KV cache of the model that is loaded now; all 0 when none is. Begins anew with each load.

    `shared` of the `used` of all `cells` are held by more than one sequence. `idle` of the `slots` serve
    nobody, `kept` of them hold tokens that a next prompt may start from. `evictions` made room for others,
    at the cost of `evicted_tokens` that idle slots had kept. Of the `prompt_tokens` that were given slots,
    `reused_tokens` had their KV already.

    `checkpoints` of `checkpoint_bytes` are what models that cannot trim may go back to; `checkpoints_dropped` had to
    go for the budget's sake. `checkpoint_hits` prompts went back to one. `saved` sequences of `saved_bytes` wait in RAM
    for somebody who begins like them; `saved_dropped` had to go for the budget's sake, `saved_hits` times one came
    back. Checkpoints and saved sequences spared `restored_tokens` (part of the reused ones). `state_failures` states
    could not be saved or restored: their tokens were decoded instead.

    `disk` files of `disk_bytes` in the cache_dir are this model's. `disk_hits` prompts began with what one of them
    held. `disk_written` were written, `disk_dropped` not, for they came too fast or were too large; `disk_failures` is
    how often a file could not be read or written, or was damaged.
    """

    cells: int = 0
    used: int = 0
    shared: int = 0
    slots: int = 0
    idle: int = 0
    kept: int = 0
    evictions: int = 0
    evicted_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    checkpoints_dropped: int = 0
    checkpoint_hits: int = 0
    saved: int = 0
    saved_bytes: int = 0
    saved_dropped: int = 0
    saved_hits: int = 0
    restored_tokens: int = 0
    state_failures: int = 0
    disk: int = 0
    disk_bytes: int = 0
    disk_hits: int = 0
    disk_written: int = 0
    disk_dropped: int = 0
    disk_failures: int = 0

    @property
    def reuse_ratio(self) -> float | None:
        """The share of prompt tokens that were not decoded again; None before the first prompt."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else None
