"""Pin: the wish of one session that the beginning of a sequence be kept.

A wish and never a lock: what is pinned is evicted last of all that is idle, and saved before where a RAM tier
is. So nobody waits because of a pin.
"""

from __future__ import annotations


class Pin:
    """Held by a session and seen by the worker thread, for as long as it is not released. Any thread."""

    __slots__ = ("released",)

    def __init__(self) -> None:
        self.released = False

    def __repr__(self) -> str:
        return f"<Pin{' released' if self.released else ''}>"

    def release(self) -> None:
        """The session is over. Idempotent, never blocks; the next eviction sees it."""
        self.released = True
