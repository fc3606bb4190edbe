"""The watchdog: one thread of the process that notices when a worker's thread will not come back.

    the thread is parked (its native code crashed)       -> give the worker up
    its loading thread is parked                         -> the load has failed; the worker decides what then
    a native thread that may compute for it is parked    -> abort the call; if it does not end, give the worker up
    a call takes longer than step_timeout                -> abort the call; if it does not end, give the worker up

To give a worker up is to answer everyone with WorkerDied, from here, without touching the engine: that
belongs to the thread, for ever if need be. The watchdog sleeps until a thread is parked or the earliest call
could be overdue: with step_timeout it wakes about once in that time, without it only for news.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref

from llama_worker._commands import settle
from llama_worker._engine_calls import EngineCall
from llama_worker._errors import ModelLoadError, WorkerDied
from llama_worker._loop import dismiss
from llama_worker._parking import crash_of, news, stray_since
from llama_worker._service import Service

logger = logging.getLogger("llama_worker")

GRACE = 2.0
"""Seconds in which a call must end once it was aborted because a thread of llama.cpp's crashed."""


class Watch:
    """One worker's. `look` acts on what is due and says when to look again."""

    def __init__(self, service: Service, thread: threading.Thread, step_timeout: float | None) -> None:
        self._service = weakref.ref(service)
        self._thread = thread
        self._step_timeout = step_timeout
        self._aborted: EngineCall | None = None
        self._last_chance = 0.0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to watch."""
        service = self._service()
        return service is None or service.parked or not self._thread.is_alive()

    def look(self) -> float | None:
        """Seconds until the next look is due; None when nothing is, before there are news."""
        service = self._service()
        if service is None or service.parked:
            return None
        crash = crash_of(self._thread)
        if crash is not None:
            service.calls.abandoned = True
            give_up(service, f"llama.cpp crashed: {crash.reason}")
            return None
        _look_at_loading(service)
        call = service.calls.current
        return self._step_timeout if call is None else self._look_at(service, call)

    def _look_at(self, service: Service, call: EngineCall) -> float | None:
        now = service.clock()
        if self._aborted is call:
            if now >= self._last_chance and service.calls.abandon(call):
                give_up(service, self._why(call, now))
            return max(self._last_chance - now, 0.0)
        stray, limit = stray_since(call.since), self._step_timeout
        if stray is not None:
            return self._abort(service, call, now + GRACE, None)
        if limit is None or now < call.since + limit:
            return None if limit is None else call.since + limit - now
        return self._abort(service, call, now + limit, limit)

    def _abort(self, service: Service, call: EngineCall, last_chance: float, limit: float | None) -> float:
        if limit is None:
            logger.error("a thread of llama.cpp crashed; the step that runs is aborted")
        else:
            logger.error("a step has not ended within step_timeout=%g s; it is aborted", limit)
        self._aborted, self._last_chance = call, last_chance
        abort = service.abort
        if abort is not None:
            service.calls.interrupt(call, abort, limit)
        return last_chance - service.clock()

    def _why(self, call: EngineCall, now: float) -> str:
        stray = stray_since(call.since)
        if stray is not None:
            return f"llama.cpp crashed on one of its own threads: {stray.reason}"
        return f"a step did not end within {now - call.since:.3g} s, although it was aborted at step_timeout"


def give_up(service: Service, reason: str) -> None:
    """Answer everyone in place of the worker thread, which may be anywhere but never gets to them."""
    error = WorkerDied(f"{reason}; its thread and its model's memory are lost, open a new LlamaWorker")
    logger.error("the worker died: %s", error)
    try:
        if not service.is_over:  # else it was the freeing of the model that crashed
            dismiss(service, error, "dead")
        change = service.change
        if change is not None and change.loading is not None:
            change.loading.cancel()
    finally:
        service.preparer.close()
        settle(service.freed)
        settle(service.ended)


def _look_at_loading(service: Service) -> None:
    change = service.change
    loading = None if change is None else change.loading
    crash = None if loading is None else loading.crash
    if loading is not None and crash is not None and not loading.is_done:
        loading.give_up(ModelLoadError(f"llama.cpp crashed while it loaded the model: {crash.reason}", crashed=True))
        service.channel.nudge()


class _Watchdog:
    """The thread and what it watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: list[Watch] = []
        self._started = False

    def add(self, watch: Watch) -> None:
        with self._lock:
            self._watches.append(watch)
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="llama-worker-watchdog", daemon=True).start()
        news.set()

    def round(self) -> float | None:
        """Look at every worker; seconds until the next round is due."""
        with self._lock:
            self._watches = [watch for watch in self._watches if not watch.is_over]
            watches = self._watches.copy()
        pauses = [pause for watch in watches if (pause := _look(watch)) is not None]
        return min(pauses, default=None)

    def _run(self) -> None:
        while True:
            pause = self.round()
            news.wait(pause)
            news.clear()


def _look(watch: Watch) -> float | None:
    try:
        return watch.look()
    except Exception:
        logger.exception("the watchdog could not answer for a worker")
        return 1.0


_watchdog = _Watchdog()


def watch(service: Service, thread: threading.Thread, step_timeout: float | None) -> None:
    """See to it that nobody waits for `service` when `thread`, which has started, does not come back."""
    _watchdog.add(Watch(service, thread, step_timeout))


def _after_fork() -> None:
    global _watchdog  # the parent's thread is not in the child
    _watchdog = _Watchdog()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
