"""Snapshots of a Service for other threads: what it counted, and how full its cache is. They never wait."""

from __future__ import annotations

from dataclasses import fields
from pathlib import PurePath
from typing import Any

import numpy as np

from llama_worker._config import ModelConfig
from llama_worker._disk_tier import DiskHits
from llama_worker._lora_metrics import LoraMetrics
from llama_worker._metrics import Answered, CacheMetrics, Drafts, Metrics, Work
from llama_worker._service import Service
from llama_worker._view import ModelView


def metrics_of(service: Service) -> Metrics:
    meter, channel = service.meter, service.channel
    # Answers before acceptances: nothing that is answered here can be missing there.
    counted = {
        **_fields_of(meter.answers, Answered),
        **_fields_of(meter.work, Work),
        **_fields_of(meter.drafts, Drafts),
    }
    return Metrics(
        **counted,
        accepted=channel.n_accepted,
        refused=channel.n_refused,
        queued=channel.queued,
        steps=service.n_steps,
        aborts=service.n_aborts,
        decode_errors=meter.decode_errors,
        kv_recoveries=meter.kv_recoveries,
        preemptions=meter.preemptions,
        reloads=meter.reloads,
        reloads_failed=meter.reloads_failed,
        queue_wait=meter.queue_wait.snapshot(),
        time_to_first_token=meter.time_to_first_token.snapshot(),
        inter_token=meter.inter_token.snapshot(),
        step_time=meter.step_time.snapshot(),
    )


def cache_metrics_of(service: Service) -> CacheMetrics:
    loaded = service.loaded
    if loaded is None:
        return CacheMetrics()
    cache = loaded.scheduler.cache
    idle = [slot for slot in cache.slots if not slot.busy]
    counts, checkpoints, tier = cache.counts, cache.checkpoints, cache.tier
    disk, on_disk = loaded.disk, loaded.scheduler.disk
    hits = DiskHits() if on_disk is None else on_disk.hits
    return CacheMetrics(
        cells=cache.cells.n,
        used=cache.cells.used,
        shared=int(np.count_nonzero(cache.cells.holders() > 1)),
        slots=len(cache.slots),
        idle=len(idle),
        kept=sum(slot.n > 0 for slot in idle),
        evictions=counts.evictions,
        evicted_tokens=counts.evicted_tokens,
        prompt_tokens=counts.prompt_tokens,
        reused_tokens=counts.reused_tokens,
        checkpoints=checkpoints.n,
        checkpoint_bytes=checkpoints.n_bytes,
        checkpoints_dropped=checkpoints.counts.dropped,
        checkpoint_hits=checkpoints.counts.hits,
        saved=len(tier.entries),
        saved_bytes=tier.n_bytes,
        saved_dropped=tier.counts.dropped,
        saved_hits=tier.counts.hits,
        restored_tokens=checkpoints.counts.restored_tokens + tier.counts.restored_tokens + hits.restored_tokens,
        state_failures=checkpoints.counts.failed,
        disk=0 if disk is None else disk.n_files,
        disk_bytes=0 if disk is None else disk.n_bytes,
        disk_hits=hits.hits,
        disk_written=0 if disk is None else disk.written,
        disk_dropped=0 if disk is None else disk.dropped,
        disk_failures=0 if disk is None else disk.failures,
    )


def kept_bytes_of(service: Service) -> int | None:
    """Bytes of saved states that are free when the model is unloaded; None when that is so already."""
    loaded = service.loaded
    if loaded is None:
        return None
    cache = loaded.scheduler.cache
    # With a disk they go into the line to it, which is memory too.
    return cache.checkpoints.n_bytes + cache.tier.own_bytes if loaded.disk is None else 0


def coming_of(service: Service) -> ModelConfig | None:
    """What is being loaded while there is no model, if anything is."""
    change = service.change  # before a look at `loaded`: a load that has just ended is no longer coming
    loading = None if change is None else change.loading
    return loading.config if loading is not None and service.loaded is None else None


def lora_metrics_of(service: Service) -> dict[str, LoraMetrics]:
    loaded = service.loaded
    return service.loras.snapshot({} if loaded is None else loaded.view.loras)


def name_of(service: Service, view: ModelView | None) -> str:
    """The model's, without its path; `view` is what callers are shown of it now."""
    return PurePath(service.config.model).stem if view is None else view.info.name


def _fields_of(value: object, kind: type[Any]) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(kind)}
