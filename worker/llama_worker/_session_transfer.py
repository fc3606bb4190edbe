"""Sessions as bytes, out of a worker and into it: what is held, with the KV that the worker has of it.

An import is checked whole before anything is changed: first the bytes, then whose they are, then whether they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import date
from typing import TypeVar

from llama_worker._cache_transfer import CacheTransfer
from llama_worker._disk_threads import begin, then
from llama_worker._errors import ContextOverflowError, ManifestMismatchError, StateError
from llama_worker._identity import KVIdentity
from llama_worker._loras import chosen
from llama_worker._manifest import RuntimeIdentity
from llama_worker._requests import GenerationRequest
from llama_worker._session_jobs import Held, check_ids
from llama_worker._session_state import SessionState
from llama_worker._view import ModelView

T = TypeVar("T")


def exported(transfer: CacheTransfer, view: ModelView, held: Held, today: date) -> Future[bytes]:
    """The session that holds `held`, as bytes. Never blocks. Raises ManifestMismatchError at once.

    The future may fail with OSError when the model's file cannot be read any more, with WorkerClosed, and with
    ManifestMismatchError when another model came meanwhile.
    """
    held.check(view)
    kv = KVIdentity(held.manifest.identity.loras)
    states: Future[bytes | None] = (
        transfer.export_prefix(view, held.tokens[: held.n_computed], kv)
        if view.limits.can_save and held.n_computed
        else begin(lambda: None)
    )
    return then(_or_mismatch(states), lambda found: SessionState(held, today, found or b"").to_bytes())


def imported(
    transfer: CacheTransfer, view: ModelView, asked: GenerationRequest, data: bytes
) -> tuple[SessionState, Future[int]]:
    """What `exported` gave, for a session that asks as `asked` does, and of how many tokens the KV is taken in.

    Blocks for as long as reading `data` takes. Raises StateError, ManifestMismatchError, ContextOverflowError and
    InvalidRequestError; the future may fail with the first two. Nothing was changed then.
    """
    state = SessionState.parsed(data)
    kv = chosen(asked, view.loras, view.limits)
    state.held.check(view, kv)
    tokens = state.held.tokens
    check_ids(view, tokens)
    if len(tokens) >= view.n_ctx:
        raise ContextOverflowError(stage="import", resident=0, additional=len(tokens) + 1, n_ctx=view.n_ctx)
    here = replace(state.held.manifest, identity=RuntimeIdentity.of(view, kv.loras))
    mine = replace(state, held=replace(state.held, manifest=here))
    if not (state.states and view.limits.can_save):
        return mine, begin(lambda: 0)
    return mine, _or_mismatch(transfer.import_prefix(view, state.states))


def _or_mismatch(taken: Future[T]) -> Future[T]:
    """What is not damaged, and refused all the same, was computed by something else."""
    answer: Future[T] = Future()

    def pass_on(done: Future[T]) -> None:
        begin(_result_of(done), answer)

    taken.add_done_callback(pass_on)
    return answer


def _result_of(done: Future[T]) -> Callable[[], T]:
    def result() -> T:
        try:
            return done.result()
        except StateError as exc:
            raise ManifestMismatchError(str(exc)) from exc

    return result
