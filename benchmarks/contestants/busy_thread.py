"""The neighbour of the busy line."""

from __future__ import annotations

import threading


class BusyThread:
    """A context in which another Python thread counts without ever waiting."""

    def __init__(self) -> None:
        self._stop = False
        self._thread = threading.Thread(target=self._count)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def _count(self) -> None:
        n = 0
        while not self._stop:
            n += 1
