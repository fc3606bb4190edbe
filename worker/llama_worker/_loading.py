"""Loading: one model on its way, on a thread of its own, until the worker takes it.

The worker thread never loads: while it waits for a model it still answers who is cancelled, who is late
and who wants it to end, and with `overlap` it goes on serving the model that it has. The loading thread
hands the whole model over and touches it no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from llama_worker._config import ModelConfig
from llama_worker._engine.base import LoadedModel, Loader
from llama_worker._engine.progress import LoadProgress, watched_by
from llama_worker._errors import ModelLoadError, TemplateError
from llama_worker._loader_thread import Errand, Launch
from llama_worker._loras import load_loras
from llama_worker._parking import Crash, crash_of, news
from llama_worker._view import ModelView

_LOOK = 0.2  # seconds between two looks at whether the thread was given up


class Loading:
    """One load. Made, asked and cancelled by the worker thread."""

    def __init__(self, loader: Loader, config: ModelConfig, epoch: int, progress: LoadProgress) -> None:
        self.config = config
        self.progress = progress
        self._loader = loader
        self._epoch = epoch
        self._settled = threading.Lock()
        self._outcome: tuple[LoadedModel, ModelView] | Exception | None = None
        self._taken = False
        self._errand: Errand | None = None
        self._runner: threading.Thread | None = None
        self._given_up = False

    def __repr__(self) -> str:
        return f"<Loading {self.config.model!r} {'done' if self.is_done else 'under way'}>"

    def start(self, launch: Launch, done: Callable[[], None]) -> None:
        """Begin. `done` is called by the loading thread when there is an outcome."""
        self._errand = launch(lambda: self._run(done))
        if self.crash is not None:  # the watchdog may have been told before it could find the errand
            news.set()

    @property
    def is_done(self) -> bool:
        return self._outcome is not None

    @property
    def failure(self) -> Exception | None:
        """Why there is no model; None as long as there may be one."""
        return self._outcome if isinstance(self._outcome, Exception) else None

    def take(self) -> tuple[LoadedModel, ModelView]:
        """The model, which belongs to the calling thread from now on. Only after success, and once."""
        assert isinstance(self._outcome, tuple)
        self._taken = True
        model, view = self._outcome
        model.adopt()
        return model, view

    def cancel(self) -> None:
        """Nobody wants the model any more: it is freed, here or by the loading thread. Never blocks for long."""
        with self._settled:
            self.progress.cancel()
        if isinstance(self._outcome, tuple) and not self._taken:
            self.take()[0].close()

    def join(self) -> None:
        """Wait until the loading thread is through with it."""
        errand = self._errand
        while errand is not None and errand.is_alive() and not self._given_up:
            errand.join(_LOOK)

    @property
    def crash(self) -> Crash | None:
        """Why the loading thread is parked; None when it is not. Any thread."""
        errand = self._errand  # one that has not begun waits behind another, on the same thread
        return crash_of(self._runner or (None if errand is None else errand.thread))

    def give_up(self, failure: ModelLoadError) -> None:
        """The loading thread is parked: `failure` is the outcome, and nobody waits for the thread. The watchdog."""
        self._outcome, self._given_up = failure, True

    def _run(self, done: Callable[[], None]) -> None:
        self._runner = threading.current_thread()
        outcome = self._load()
        with self._settled:
            unwanted = self.progress.is_cancelled
            if unwanted and isinstance(outcome, tuple):
                outcome[0].close()
                outcome = ModelLoadError(f"loading {self.config.model!r} was cancelled")
            self._outcome = outcome
        done()

    def _load(self) -> tuple[LoadedModel, ModelView] | Exception:
        try:
            with watched_by(self.progress):
                model = self._loader(self.config)
        except BaseException as exc:  # noqa: BLE001  whatever it is, the worker must hear of it
            return exc if isinstance(exc, Exception) else ModelLoadError(f"loading ended by {type(exc).__name__}")
        try:
            config = model.config or self.config
            return model, ModelView.of(model, config, self._epoch, load_loras(model.engine, config))
        except Exception as exc:  # noqa: BLE001  a template, or anything that the model brings along
            model.close()
            return ModelLoadError(str(exc)) if isinstance(exc, TemplateError) else exc
