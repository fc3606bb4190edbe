"""StopMatcher: ends a text at the first stop string, however the text arrives."""

from __future__ import annotations


class StopMatcher:
    """Passes text on up to the first stop string. For one reply and one thread at a time.

    The rule is that of the whole text, so it does not depend on how the text is cut into chunks: the match
    that *starts* first wins, and of those the shortest, because it is complete first. The text is passed on
    up to that start; the stop string and what follows are never seen.

    A match inside a longer stop string that is still possible waits until that one is decided: with the stops
    "abcd" and "bc", "abc" is held, and becomes "" after "d" but "a" after anything else or at the end.

    `stops` must not contain "". `matched` is the stop string that was met, None until then.
    """

    __slots__ = ("_firsts", "_held", "_longest", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...]) -> None:
        # Shortest first: min() over equal starts then keeps the shortest.
        self._stops = tuple(sorted(set(stops), key=len))
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """A stop string was met: nothing more will be passed on, the generation can end."""
        return self.matched is not None

    def feed(self, text: str) -> str:
        """What of the text so far can safely be passed on now; "" after a stop. Never blocks."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        buffer = self._held + text
        start, stop = self._first_match(buffer)
        undecided = self._first_undecided(buffer)
        if stop is not None and start < undecided:
            return self._end(buffer[:start], stop)
        self._held = buffer[undecided:]
        return buffer[:undecided]

    def flush(self) -> str:
        """The generation ended for another reason: what was held back, up to a stop string in it."""
        buffer, self._held = self._held, ""
        start, stop = self._first_match(buffer)
        return buffer if stop is None else self._end(buffer[:start], stop)

    def _end(self, text: str, stop: str) -> str:
        self.matched = stop
        self._held = ""
        return text

    def _first_match(self, buffer: str) -> tuple[int, str | None]:
        found = [(start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        return min(found, key=lambda match: match[0], default=(len(buffer), None))

    def _first_undecided(self, buffer: str) -> int:
        """Where the longest end of `buffer` starts that may yet grow into a stop string."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if buffer[start] in self._firsts and self._may_begin(buffer[start:]):
                return start
        return len(buffer)

    def _may_begin(self, end: str) -> bool:
        return any(len(stop) > len(end) and stop.startswith(end) for stop in self._stops)
