"""Health: whether a worker serves, and if not as it should, why."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from llama_worker._service import Service, State

Verdict: TypeAlias = Literal["healthy", "degraded", "unhealthy"]

SLOW_STEP = 30.0
"""Seconds that one engine call may take before the worker counts as degraded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """A snapshot of how a worker does.

    `verdict`: "healthy" serves, "degraded" serves late (it loads, drains, is full or in a slow step),
    "unhealthy" refuses until somebody acts. `reason` says why, "" when healthy; it carries no prompt text.
    `since_step` is seconds since the last step ended, None before the first.
    """

    verdict: Verdict
    reason: str
    state: State
    since_step: float | None

    @property
    def is_serving(self) -> bool:
        """Whether a request that is submitted now will be served, if perhaps late."""
        return self.verdict != "unhealthy"


def health_of(service: Service, *, inherited: bool = False) -> Health:
    now, last = service.clock(), service.meter.last_step
    verdict, reason = _inherited() if inherited else _judge(service, now)
    since = None if last is None else max(now - last, 0.0)
    return Health(verdict=verdict, reason=reason, state="closed" if inherited else service.state, since_step=since)


def _inherited() -> tuple[Verdict, str]:
    return "unhealthy", "it was inherited through fork(), without its thread; open a new one"


def _judge(service: Service, now: float) -> tuple[Verdict, str]:
    state, refusal, call = service.state, service.refusal, service.calls.current
    if state in ("closed", "dead") or refusal is not None:
        return "unhealthy", state if refusal is None else f"{type(refusal).__name__}: {refusal}"
    if state in ("loading", "draining"):
        return "degraded", f"{state}; new requests wait"
    if call is not None and now - call.since > SLOW_STEP:
        return "degraded", f"one step has taken {now - call.since:.0f} s so far"
    if service.channel.waiting:
        return "degraded", f"full; {service.channel.waiting} callers wait for room in the queue"
    return "healthy", ""


def without_paths(health: Health) -> Health:
    """`health` as others may read it: files by their names alone."""
    return replace(health, reason=re.sub(r"[^\s'\"(]*[/\\]", "", health.reason))
