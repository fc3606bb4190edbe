"""Claims of the benchmarks that measure llama-worker alone: a figure, its bound, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A figure that is to be `at_most`; without that it is only reported."""

    text: str
    value: float
    at_most: float | None = None
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.at_most is None or self.value <= self.at_most

    def __str__(self) -> str:
        target = "" if self.at_most is None else f"≤ {self.at_most:g}"
        verdict = "reported" if self.at_most is None else "PASS" if self.met else "FALLS SHORT"
        return f"{self.text:64} {self.value:10.4g} {self.unit:3} {target:8} {verdict}"


def end_over_beginning(figures: Sequence[float]) -> float:
    """The median of the last tenth of `figures` over that of the first tenth."""
    tenth = max(3, len(figures) // 10)
    return median(figures[-tenth:]) / median(figures[:tenth])


def report(found: Sequence[Found]) -> int:
    """Print the last of it; 1 when something falls short."""
    for each in found:
        print(each, flush=True)
    return int(not all(each.met for each in found))
