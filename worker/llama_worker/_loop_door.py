"""LoopDoor: how any thread has something done on an event loop, and a bell that rings there."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial


class LoopDoor:
    """The way into one event loop: many mailboxes, at most one wake-up under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._knocking = False
        self._ready: deque[Callable[[], None]] = deque()

    def knock(self, ready: Callable[[], None]) -> bool:
        """Have `ready` called on the loop. Any thread. False when the loop is closed."""
        loop = self._loop()
        if loop is None:
            return False
        self._ready.append(ready)
        if self._knocking:
            return not loop.is_closed()
        self._knocking = True
        try:
            loop.call_soon_threadsafe(self._open)
        except RuntimeError:  # the loop closed under us
            return False
        return True

    def _open(self) -> None:
        # First lower the flag, then empty: what arrives meanwhile knocks again or is emptied here.
        self._knocking = False
        while self._ready:
            self._ready.popleft()()


_doors: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopDoor] = weakref.WeakKeyDictionary()


def bell() -> tuple[asyncio.Future[None], Callable[[], object]]:
    """A future of the running loop, and what rings it: any thread, never blocks, as often as one likes."""
    loop = asyncio.get_running_loop()
    rung: asyncio.Future[None] = loop.create_future()
    return rung, partial(loop_door(loop).knock, lambda: None if rung.done() else rung.set_result(None))


def loop_door(loop: asyncio.AbstractEventLoop) -> LoopDoor:
    """The door of `loop`; call it on that loop."""
    door = _doors.get(loop)
    if door is None:
        door = _doors[loop] = LoopDoor(loop)
    return door
