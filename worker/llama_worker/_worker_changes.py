"""WorkerChanges: another model, other adapters, other settings, other contents of the cache, while a worker serves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from llama_worker._admission import Admission
from llama_worker._awaited import carried_through
from llama_worker._cache_transfer import CacheTransfer
from llama_worker._channel import CommandChannel
from llama_worker._commands import ChangeLora, Reload
from llama_worker._config import ModelConfig, WorkerConfig, as_model_config
from llama_worker._desk import Desk
from llama_worker._errors import InvalidRequestError
from llama_worker._llama_loading import check_loras, check_reload
from llama_worker._lora_changes import with_paths
from llama_worker._preparer import Preparer
from llama_worker._published import Published
from llama_worker._reconfiguring import apply as apply_live
from llama_worker._reconfiguring import changed as reconfigured
from llama_worker._service import Service
from llama_worker._snapshots import coming_of, kept_bytes_of


class WorkerChanges:
    """The part of LlamaWorker that asks the worker thread to serve otherwise."""

    _live_config: WorkerConfig
    _loads_llama: bool
    _service: Service
    _published: Published
    _channel: CommandChannel
    _admission: Admission
    _preparer: Preparer
    _desk: Desk
    _transfer: CacheTransfer

    # -- the model ----------------------------------------------------------------------------------

    def reload(
        self,
        config: ModelConfig | str | None = None,
        *,
        when: Literal["drain", "now"] = "drain",
        timeout: float | None = None,
        overlap: bool | Literal["auto"] = False,
        progress: Callable[[float], object] | None = None,
        **changes: Any,
    ) -> None:
        """Serve another model, or the same one otherwise configured. Blocks until it serves.

        `config` replaces every field, `changes` only those named. Requests that run are finished first
        ("drain"; cancelled when that has taken `timeout` seconds) or cancelled ("now"); those that wait keep their
        place and run on the new model. What can be checked is checked while the old model serves on;
        a worker that chats refuses a model that only embeds.
        With `overlap` the new model is loaded beside the old one, which serves on until then; "auto" does
        so when both fit into memory. `progress` is called with the fraction that is loaded, by the
        loading thread, and must not wait for this worker. Raises ConfigError, InvalidRequestError, ModelLoadError
        (`previous_restored` says whether the old model serves on) and WorkerClosed.
        """
        self._reload(config, when, timeout, overlap, progress, changes).answer.result()

    async def areload(
        self,
        config: ModelConfig | str | None = None,
        *,
        when: Literal["drain", "now"] = "drain",
        timeout: float | None = None,
        overlap: bool | Literal["auto"] = False,
        progress: Callable[[float], object] | None = None,
        **changes: Any,
    ) -> None:
        """The async twin of `reload`. A task that is cancelled here does not stop the reload."""
        self._desk.check_process()
        begun = self._preparer.submit(lambda: self._reload(config, when, timeout, overlap, progress, changes))
        await carried_through((await carried_through(begun)).answer)

    def _reload(
        self,
        config: ModelConfig | str | None,
        when: Literal["drain", "now"],
        timeout: float | None,
        overlap: bool | Literal["auto"],
        progress: Callable[[float], object] | None,
        changes: Mapping[str, Any],
    ) -> Reload:
        self._desk.check_process()
        if when not in ("drain", "now"):
            raise InvalidRequestError("when", when, "it is 'drain' or 'now'")
        if overlap not in (True, False, "auto"):
            raise InvalidRequestError("overlap", overlap, "it is True, False or 'auto'")
        # What was asked for last, which is more than what is served where that was made to fit.
        wanted = _changed(self._service.config if config is None else as_model_config(config), changes)
        beside = self._checked(wanted, overlap) if self._loads_llama else bool(overlap)
        command = Reload(
            config=wanted,
            when=when,
            timeout=timeout,
            overlap=beside,
            progress=progress,
            noted=self._service.meter.reloaded,
        )
        if not self._channel.command(command):
            raise self._published.why_closed()
        return command

    def _checked(self, wanted: ModelConfig, overlap: bool | Literal["auto"]) -> bool:
        coming = coming_of(self._service)  # first: what comes meanwhile has bytes to keep
        return check_reload(wanted, self._published.current, overlap, kept_bytes_of(self._service), coming)

    # -- its adapters -------------------------------------------------------------------------------

    def add_lora(self, name: str, path: str | Path) -> None:
        """Offer the LoRA adapter in a GGUF file under `name`, beside those there are. Blocks until it is read.

        Requests that run meanwhile wait as long as that takes. A name that is taken means the new file from now
        on; requests that have begun finish with the old one. `config.lora_paths` has it too, so a reload that
        changes other fields keeps it.

        Raises LoraLoadError, ConfigError, InsufficientMemoryError, and ModelNotFoundError when the model's own file,
        which it is held against, is not any more where it was loaded from; then nothing has changed.
        """
        self._change_lora(name, path).answer.result()

    async def aadd_lora(self, name: str, path: str | Path) -> None:
        """The async twin of `add_lora`."""
        await self._achange_lora(name, path)

    def remove_lora(self, name: str) -> None:
        """Offer the LoRA adapter `name` no longer. Requests that have begun with it finish, and then its memory is
        given back; those that still wait in the queue fail with InvalidRequestError, as new ones do. It helps too
        where an idle model cannot be loaded again because the adapter's file is gone.

        Raises InvalidRequestError for a name that is not loaded.
        """
        self._change_lora(name, None).answer.result()

    async def aremove_lora(self, name: str) -> None:
        """The async twin of `remove_lora`."""
        await self._achange_lora(name, None)

    def _change_lora(self, name: str, path: str | Path | None) -> ChangeLora:
        view = self._desk.view()
        if path is not None:
            config = with_paths(view.config, {name: path})
            if self._loads_llama and view.limits.n_loras:
                check_loras(config, view.info)  # what can be seen here costs no running request any time
        command = ChangeLora(name=name, path=None if path is None else os.fspath(path))
        if not self._channel.command(command):
            raise self._published.why_closed()
        return command

    async def _achange_lora(self, name: str, path: str | Path | None) -> None:
        self._desk.check_process()
        begun = self._preparer.submit(lambda: self._change_lora(name, path))
        await carried_through((await carried_through(begun)).answer)

    # -- the settings -------------------------------------------------------------------------------

    def reconfigure(self, **changes: Any) -> None:
        """Change `queue_size`, `on_full`, `step_budget_ms` or `keep_alive` of the running worker. Never waits.

        A smaller queue_size drops nobody who waits already. Raises ConfigError and WorkerClosed; then nothing
        has changed.
        """
        self._desk.check_process()
        self._service.check_open(self._published.why_closed)
        self._live_config = reconfigured(self._live_config, changes)
        apply_live(self._live_config, self._service, self._admission)

    # -- what is kept -------------------------------------------------------------------------------

    def export_cache(self, folder: str | Path | None = None) -> int:
        """Write the states of everything that is kept, in slots and in RAM, into `folder`, or the model's cache_dir.

        They stay kept here. A worker with the same model and settings, in this process or another, can `import_cache`
        them, or be opened with that folder as its cache_dir. Returns how many prefixes there are. Blocks; running
        requests wait while states are copied, not while they are written, and all copies are in memory until they are;
        the model's file is read once for its digest. In the model's own cache_dir all files keep to `cache_disk`.
        Raises InvalidRequestError without a folder, OSError, UnsupportedFeatureError for a model without states,
        ModelNotFoundError when its file is not any more where it was loaded from, and what `info` raises.
        """
        return self._transfer.export_cache(self._desk.view(), folder).result()

    async def aexport_cache(self, folder: str | Path | None = None) -> int:
        """The async twin of `export_cache`."""
        view = await self._desk.aview()
        return await asyncio.wrap_future(self._transfer.export_cache(view, folder))

    def import_cache(self, folder: str | Path | None = None) -> int:
        """Take what `export_cache` wrote, or another worker's cache_dir, into RAM, as much as cache_ram holds.

        What is damaged, or another model's, template's or setting's, is left out. Returns how many prefixes are kept.
        An idle model that was let go is loaded for it, and a reload is waited for. Blocks and raises as `export_cache`;
        InvalidRequestError too for a folder that does not exist.
        """
        return self._transfer.import_cache(self._desk.view(), folder).result()

    async def aimport_cache(self, folder: str | Path | None = None) -> int:
        """The async twin of `import_cache`."""
        view = await self._desk.aview()
        return await asyncio.wrap_future(self._transfer.import_cache(view, folder))


def _changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**{**{name: getattr(config, name) for name in ModelConfig.model_fields}, **changes})
