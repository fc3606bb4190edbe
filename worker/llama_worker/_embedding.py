"""One step of embedding: a batch of texts, of as many requests as fit together."""

from __future__ import annotations

from llama_worker._engine.base import Aborted
from llama_worker._errors import LlamaWorkerError
from llama_worker._service import Loaded


def embed(loaded: Loaded) -> None:
    """One batch of texts, of as many requests as fit together."""
    batch = loaded.embeds.next_batch()
    if not batch:
        return
    flag = loaded.engine.abort_flag
    flag.clear()
    commands = {id(text.command): text.command for text in batch}.values()
    for command in commands:
        command.cancel.arm(flag.raise_)
    try:
        vectors = loaded.engine.embed([text.tokens for text in batch])
    except Aborted:
        pass  # tried again at the next step, without those that were cancelled
    except LlamaWorkerError as exc:
        loaded.embeds.fail(batch, exc)
    else:
        loaded.embeds.commit(batch, vectors)
    finally:
        for command in commands:
            command.cancel.disarm()
