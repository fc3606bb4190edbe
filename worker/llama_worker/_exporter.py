"""Exporter: shows a worker to other processes of the same user, over a local socket.

Whoever connects gets one line of JSON, and the connection ends: a poll is a connection. Nothing is read from
the socket, and nothing that goes out carries a prompt, a reply or a path.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_worker._errors import ConfigError, UnsupportedFeatureError
from llama_worker._health import health_of, without_paths
from llama_worker._service import Service
from llama_worker._snapshots import cache_metrics_of, metrics_of
from llama_worker._status import status_of

logger = logging.getLogger("llama_worker")

_SLOWEST_READER = 1.0  # seconds
_PAUSE = 0.05  # seconds after a poll that went wrong
_ONLY_THE_USER = 0o600
_numbers = itertools.count(1)


def folder() -> Path:
    """Where sockets are when no path is given: a folder of the user's own, made if need be. Raises ConfigError."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime) / "llama-worker" if runtime else Path(tempfile.gettempdir()) / f"llama-worker-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            "path", str(path), f"no folder can be made there ({exc.strerror}); name a path of your own"
        ) from exc
    found = path.lstat()  # in a folder for everybody, others may have been first
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError("path", str(path), "this folder belongs to somebody else; name a path of your own")
    return path


def check_platform(feature: str) -> None:
    """Raises UnsupportedFeatureError where there are no local sockets."""
    if not hasattr(socket, "AF_UNIX"):
        raise UnsupportedFeatureError(feature, "this platform has no Unix sockets; poll LlamaWorker.metrics() instead")


def state_of(service: Service, model: str) -> dict[str, Any]:
    """What a poll gets."""
    status = status_of(service, model)
    return {
        "pid": os.getpid(),
        "model": status.model,
        "running": status.running,
        "waiting": status.waiting,
        "embedding": status.embedding,
        "health": asdict(without_paths(health_of(service))),
        "metrics": asdict(metrics_of(service)),
        "cache": asdict(cache_metrics_of(service)),
    }


class Exporter:
    """A thread that answers polls on the socket `path` with what `state` returns, until it is closed.

    Raises ConfigError when the path cannot be used, and UnsupportedFeatureError where there are no such sockets.
    """

    def __init__(self, state: Callable[[], Mapping[str, Any]], path: str | Path | None = None) -> None:
        check_platform("export")
        if path is not None and not isinstance(path, str | Path):
            raise ConfigError("path", type(path).__name__, "give a path, or None for one in your runtime folder")
        self.path = folder() / f"{os.getpid()}-{next(_numbers)}.sock" if path is None else Path(path).absolute()
        self._state = state
        self._socket = _listen(self.path)
        self._inode = self.path.stat().st_ino
        self._over = threading.Event()
        threading.Thread(target=self._serve, name="llama-worker-exporter", daemon=True).start()

    def close(self) -> None:
        """Remove the socket and end the thread. Idempotent; does not wait for who is reading."""
        if self._over.is_set():
            return
        self._over.set()
        with suppress(OSError):
            _connected(self.path).close()  # the thread wakes up and sees that it is over
        with suppress(OSError):
            if self.path.stat().st_ino == self._inode:  # not somebody else's by now
                self.path.unlink()

    def _serve(self) -> None:
        with self._socket:
            while not self._over.is_set():
                try:
                    self._answer()
                except OSError:  # the reader went away, or there are too many open files: then not at once again
                    self._over.wait(_PAUSE)
                except Exception:  # the worker changed while it was looked at: the next poll sees it whole
                    logger.exception("a poll could not be answered")

    def _answer(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(_SLOWEST_READER)
            if not self._over.is_set():
                connection.sendall(json.dumps(self._state()).encode() + b"\n")


def poll(path: Path) -> dict[str, Any]:
    """The state of the worker that exports to `path`, now. Blocks for a moment; raises OSError."""
    with _connected(path) as connection, connection.makefile("rb") as lines:
        line = lines.readline()
    if not line:
        raise ConnectionResetError(errno.ECONNRESET, "the worker has ended", str(path))
    state: dict[str, Any] = json.loads(line)
    return state


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_SLOWEST_READER)
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(str(path))
        # Nobody can connect before listen(), so there is no moment in which others could.
        path.chmod(_ONLY_THE_USER)
        listener.listen()
    except OSError as exc:
        listener.close()
        raise ConfigError("path", str(path), f"no socket can be made there: {exc.strerror or exc}") from exc
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove what a process left behind that ended without closing its worker. Raises ConfigError."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ConfigError("path", str(path), "there is a file that is no socket; name another path")
    try:
        _connected(path).close()
    except ConnectionRefusedError:
        path.unlink()
    else:
        raise ConfigError("path", str(path), "another worker is exported there; name another path")
