"""A progress bar for loads that take long, where somebody can see it."""

from __future__ import annotations

import sys
from collections.abc import Callable

_PATIENCE = 0.5  # seconds; a load that is through by then shows nothing


def progress_bar(name: str) -> Callable[[float], object] | None:
    """Draws how far the load of `name` is on a terminal's stderr; None where there is no terminal."""
    try:
        if not sys.stderr.isatty():
            return None
    except (AttributeError, ValueError):  # no stream, one of the application's own making, or a closed one
        return None
    from tqdm import tqdm

    bar = tqdm(total=100, desc=f"loading {name}", unit="%", delay=_PATIENCE, leave=False, bar_format="{l_bar}{bar}|")

    def draw(fraction: float) -> None:
        bar.update(100 * fraction - bar.n)
        if fraction >= 1.0:
            bar.close()

    return draw
