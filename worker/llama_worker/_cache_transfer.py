"""CacheTransfer: what a worker keeps, taken along: to a folder and back, or one beginning of a prompt as bytes.

The callers' side. The worker thread only copies states (see `_transfers`); digests and files are the work of a
thread of their own, so that neither a generation nor an event loop waits for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from llama_worker._cache_identity import fingerprint_of
from llama_worker._channel import CommandChannel
from llama_worker._commands import Export, Import, settle
from llama_worker._disk_store import DiskStore
from llama_worker._disk_threads import begin, then
from llama_worker._entry import Entry, entry_of, saved_prefix
from llama_worker._errors import InvalidRequestError, StateError, UnsupportedFeatureError
from llama_worker._identity import BASE, KVIdentity
from llama_worker._other_load import OtherLoad, mark_of
from llama_worker._saved_prefix import SavedPrefix
from llama_worker._superseding import supersede
from llama_worker._tokens import TokenIds
from llama_worker._view import ModelView

_Found: TypeAlias = tuple[ModelView, tuple[Entry, ...]]


class CacheTransfer:
    """Exports and imports of one worker. Any thread; no method blocks: each returns a future."""

    def __init__(self, channel: CommandChannel, why_closed: Callable[[], Exception]) -> None:
        self._channel = channel
        self._why_closed = why_closed

    def export_cache(self, view: ModelView, folder: str | Path | None) -> Future[int]:
        """Write everything that is kept into `folder`; how many prefixes. See LlamaWorker.export_cache."""
        path = _folder(view, folder)
        return then(self._export(view, None), lambda found: _write(path, *found))

    def import_cache(self, view: ModelView, folder: str | Path | None) -> Future[int]:
        """Keep what of `folder` is this model's; how many prefixes. See LlamaWorker.import_cache."""
        path = _folder(view, folder)
        return self._import(view, lambda view: _read(path, view, must_be=folder is not None))

    def export_prefix(self, view: ModelView, tokens: TokenIds, kv: KVIdentity = BASE) -> Future[bytes | None]:
        """As much of `tokens`, with `kv`, as is kept anywhere, for `import_prefix`; None when hardly any is.

        Waits for an idle slot. Fails with OSError when the model's file cannot be read any more, and with StateError
        when another model has come meanwhile.
        """
        _require_states(view)
        return then(self._export(view, tokens, kv), lambda found: _bytes_of(*found))

    def import_prefix(self, view: ModelView, data: bytes) -> Future[int]:
        """Keep what `export_prefix` gave, here or in another process; of how many tokens it is, 0 without room.

        Fails with StateError when it is damaged, or of another model, template or KV type. What was computed with
        adapters is found by requests with the same ones only.
        """
        _require_states(view)
        return self._import(view, lambda view: (_parsed(view, data),), count=lambda entries: entries[0].n)

    def _export(self, view: ModelView, tokens: TokenIds | None, kv: KVIdentity = BASE) -> Future[_Found]:
        """What is kept, and the load of the model that it is of: `view`, or the one that serves by now."""
        answer: Future[_Found] = Future()

        def ask(view: ModelView) -> None:
            command = Export(epoch=view.epoch, tokens=tokens, kv=kv)
            command.answer.add_done_callback(partial(pass_on, view))
            self._send(command)

        def pass_on(view: ModelView, done: Future[tuple[Entry, ...]]) -> None:
            error = done.exception()
            if isinstance(error, OtherLoad):
                _attempt(partial(again, view, error.view), answer)
            elif isinstance(error, Exception):
                settle(answer, error=error)
            else:
                settle(answer, result=(view, done.result()))

        def again(former: ModelView, view: ModelView) -> None:
            _require_states(view)
            if tokens is not None and fingerprint_of(former) != fingerprint_of(view):
                raise StateError("another model is loaded by now")
            ask(view)

        ask(view)
        return answer

    def _import(
        self,
        view: ModelView,
        read: Callable[[ModelView], tuple[Entry, ...]],
        count: Callable[[tuple[Entry, ...]], int] | None = None,
    ) -> Future[int]:
        """Have what `read` returns for the model that serves kept; how many of it, or what `count` says if any is."""
        answer: Future[int] = Future()

        def hand_in(view: ModelView) -> None:
            _require_states(view)
            mark, entries = mark_of(view), read(view)
            command = Import(epoch=view.epoch, entries=entries, mark=mark)
            command.answer.add_done_callback(partial(pass_on, entries))
            self._send(command)

        def pass_on(entries: tuple[Entry, ...], done: Future[int]) -> None:
            error = done.exception()
            if isinstance(error, OtherLoad):
                _attempt(partial(hand_in, error.view), answer)
            elif isinstance(error, Exception):
                settle(answer, error=error)
            else:
                n = done.result()
                settle(answer, result=count(entries) if n and count else n)

        _attempt(partial(hand_in, view), answer)
        return answer

    def _send(self, command: Export | Import) -> None:
        if not self._channel.command(command):
            command.fail(self._why_closed())


def _attempt(work: Callable[[], None], answer: Future[Any]) -> None:
    """Do `work` on the thread for disks; what it raises belongs to who waits for `answer`."""

    def run() -> None:
        try:
            work()
        except Exception as exc:  # noqa: BLE001  it belongs to whoever asked
            settle(answer, error=exc)

    begin(run)


def _folder(view: ModelView, folder: str | Path | None) -> Path:
    _require_states(view)
    chosen = view.config.cache_dir if folder is None else folder
    if chosen is None:
        raise InvalidRequestError("folder", None, "give one, or open the model with cache_dir")
    if not isinstance(chosen, str | os.PathLike):
        raise InvalidRequestError("folder", type(chosen).__name__, "give a path")
    return Path(chosen).expanduser().absolute()


def _require_states(view: ModelView) -> None:
    if not view.limits.can_save:
        raise UnsupportedFeatureError("saved states", f"{view.info.name} has none that could be taken along")


def _write(folder: Path, view: ModelView, entries: tuple[Entry, ...]) -> int:
    """Also into the model's own folder as that is written to: within its budget, nothing that a longer one holds."""
    config, names = view.config, set[str]()
    is_own = config.cache_dir is not None and folder.resolve() == Path(config.cache_dir).resolve()
    store = DiskStore(folder, fingerprint_of(view), config.cache_disk << 20 if is_own else None)
    store.look()
    for entry in entries:
        saved = saved_prefix(entry, store.fingerprint)
        if store.write(saved):
            supersede(store, entry, can_trim=view.limits.can_trim_restored)
            names.add(store.name_of(saved))
    store.look()
    return len(names & {shelved.name for shelved in store.index})


def _read(folder: Path, view: ModelView, *, must_be: bool) -> tuple[Entry, ...]:
    """What there is, as much of it as RAM may be used for: those used last, the last one last.

    A folder that `must_be` there was named by the caller; the model's own is made when something is written.
    """
    if not folder.is_dir() and (must_be or folder.exists()):
        raise InvalidRequestError("folder", str(folder), "there is no such folder; give one that export_cache wrote")
    store = DiskStore(folder, fingerprint_of(view))
    store.look()
    room, found = view.config.cache_ram << 20, []
    for shelved in sorted(store.index, key=lambda shelved: shelved.used, reverse=True):
        saved = store.read(shelved) if shelved.n_bytes <= room else None
        if saved is not None:
            room -= shelved.n_bytes
            found.append(entry_of(saved))
    return tuple(reversed(found))


def _bytes_of(view: ModelView, entries: tuple[Entry, ...]) -> bytes | None:
    return saved_prefix(entries[0], fingerprint_of(view)).to_bytes() if entries else None


def _parsed(view: ModelView, data: bytes) -> Entry:
    saved = SavedPrefix.parsed(data)
    if saved.fingerprint != fingerprint_of(view):
        raise StateError(
            f"the saved prefix of {len(saved.tokens)} tokens is another model's, or of another template, KV type, "
            "context size or llama.cpp; compute it again"
        )
    return entry_of(saved)
