"""WorkerState: what a worker is and who waits for it, as JSON; and the same worker again from it.

Never any text: of a request that waits it says for how long, for whom and how many tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from llama_worker._commands import Generate, Request
from llama_worker._config import ModelConfig, Settings, WorkerConfig
from llama_worker._errors import ConfigError
from llama_worker._service import Service
from llama_worker._version import __version__


class WaitingRequest(Settings):
    """A request that has no slot yet. `age` is in seconds; `texts` is 1 for a generation."""

    kind: Literal["generate", "embed"]
    age: float
    session: str | None
    priority: int
    prompt_tokens: int
    texts: int

    @classmethod
    def of(cls, request: Request, now: float) -> WaitingRequest:
        asked = request.job.request
        texts = (request.job.prompt,) if isinstance(request, Generate) else request.job.texts
        return cls(
            kind="generate" if isinstance(request, Generate) else "embed",
            age=max(now - request.submitted, 0.0),
            session=asked.session,
            priority=asked.priority,
            prompt_tokens=sum(map(len, texts)),
            texts=len(texts),
        )


class WorkerState(Settings):
    """The whole of it. `status` and `metrics` are for the reader; a worker is opened from `model` and `worker`."""

    version: Literal[1] = 1
    package: str = __version__
    model: ModelConfig
    worker: WorkerConfig
    status: dict[str, Any]
    metrics: dict[str, Any]
    waiting: tuple[WaitingRequest, ...] = ()

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        worker: WorkerConfig,
        status: object,
        metrics: object,
        waiting: Iterable[Request],
        now: float,
    ) -> WorkerState:
        return cls(
            model=model,
            worker=worker,
            status=to_jsonable_python(status),
            metrics=to_jsonable_python(metrics),
            waiting=tuple([WaitingRequest.of(request, now) for request in waiting]),
        )

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> WorkerState:
        """Raises ConfigError, which names the field that is missing, unknown or wrong."""
        if not isinstance(state, Mapping):
            raise ConfigError("state", type(state).__name__, "give what export_state() returned")
        if state.get("version") != 1:
            raise ConfigError("version", state.get("version"), "this package reads version 1")
        try:
            text = json.dumps(dict(state), allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise ConfigError("state", type(state).__name__, f"it is no JSON: {exc}") from None
        return cls.model_validate(_with_tuples(json.loads(text)))


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples and our settings have no lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(part) for name, part in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def waiting_requests(service: Service) -> list[Request]:
    """Who has no slot yet, accepted or not; embeddings until they are answered. A snapshot, from any thread."""
    found: list[Request] = []
    loaded = service.loaded
    if loaded is not None:
        found += [generation.command for generation in list(loaded.scheduler.waiting)]
        found += loaded.embeds.requests()
    found += [*service.renewed, *service.preparing, *service.channel.requests(), *service.channel.outside()]
    # One that moves on in this moment is in two places; prepared again it is another object with the same flag.
    return list({request.cancel: request for request in found}.values())
