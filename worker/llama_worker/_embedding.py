"""One step of embedding: a batch of texts, of as many requests as fit together."""

from __future__ import annotations

from collections.abc import Sequence

from llama_worker._embeddings import Text
from llama_worker._engine.base import Aborted, Floats
from llama_worker._errors import LlamaWorkerError, took_too_long
from llama_worker._service import Loaded, Service


def embed(service: Service, loaded: Loaded, *, newcomers: bool = True) -> None:
    """One batch of texts, of as many requests as fit together. Without `newcomers` only of those that have begun."""
    batch = loaded.embeds.next_batch(newcomers=newcomers)
    if not batch:
        return
    flag = loaded.engine.abort_flag
    flag.clear()
    commands = {id(text.command): text.command for text in batch}.values()
    for command in commands:
        command.cancel.arm(flag.raise_)
    try:
        vectors = _embed(service, loaded, batch)
    except Aborted:
        limit = service.calls.overdue
        if limit is not None:
            loaded.embeds.fail([text for text in batch if not text.command.cancel.is_set], took_too_long(limit))
        # else tried again at the next step, without those that were cancelled
    except LlamaWorkerError as exc:
        loaded.embeds.fail(batch, exc)
    else:
        loaded.embeds.commit(batch, vectors)
    finally:
        for command in commands:
            command.cancel.disarm()


def _embed(service: Service, loaded: Loaded, batch: Sequence[Text]) -> Floats:
    service.calls.begin(service.clock())
    try:
        return loaded.engine.embed([text.tokens for text in batch])
    finally:
        service.calls.end()
