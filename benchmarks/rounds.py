"""Running the contestants: a fresh process each time, the contestants of a line in turn, the order rotated."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarks import places, quiet
from benchmarks.drive import Figures
from benchmarks.lines import Contestant, Line

TIMEOUT = 600
SIDE_SHOWS = 5
"""Rounds of a contestant that no target rests on."""


ATTEMPTS = 3
"""A run that others disturbed is repeated so often; the least disturbed one is kept."""

Runner = Callable[[Contestant], list[str]]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a contestant printed, and the share of the machine that others used meanwhile."""

    figures: Figures
    disturbance: float

    @property
    def is_disturbed(self) -> bool:
        return self.disturbance > quiet.TOLERATED


@dataclass(slots=True, kw_only=True)
class Result:
    """The runs of a line by contestant and round; None where one did not take part or failed."""

    line: Line
    runs: dict[str, list[Run | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def disturbed(self) -> int:
        """Runs that others disturbed in every attempt; no ratio is taken from them."""
        return sum(run is not None and run.is_disturbed for runs in self.runs.values() for run in runs)


class ContestantFailed(Exception):
    """A contestant did not print its figures; says why."""


def run_line(line: Line, n_rounds: int, command: Runner, say: Say) -> Result:
    """All rounds of `line`. A contestant that fails once is left out from then on, with the reason kept."""
    result = Result(line=line, runs={contestant.name: [] for contestant in line.contestants})
    began = time.monotonic()
    for number in range(n_rounds):
        for contestant in _order(line, number):
            run = None
            if contestant.name not in result.failures and _takes_part(contestant, number, n_rounds):
                run = _attempt(contestant, command(contestant), result)
                say(f"{line.name} {number + 1}/{n_rounds} {contestant.name}: {_brief(line, run)}")
            result.runs[contestant.name].append(run)
    result.seconds = time.monotonic() - began
    return result


def _order(line: Line, number: int) -> Iterator[Contestant]:
    """Another one begins in each round, so that nobody always runs behind the same neighbour."""
    count = len(line.contestants)
    return (line.contestants[(number + i) % count] for i in range(count))


def _takes_part(contestant: Contestant, number: int, n_rounds: int) -> bool:
    return contestant.gates or n_rounds <= SIDE_SHOWS or number % (n_rounds // SIDE_SHOWS) == 0


def _attempt(contestant: Contestant, command: list[str], result: Result) -> Run | None:
    try:
        return _least_disturbed(command)
    except ContestantFailed as failed:
        result.failures[contestant.name] = str(failed)
        return None


def _least_disturbed(command: list[str]) -> Run:
    runs: list[Run] = []
    while len(runs) < ATTEMPTS and (not runs or runs[-1].is_disturbed):
        meter = quiet.Meter()
        figures = _figures(command)
        runs.append(Run(figures=figures, disturbance=meter.disturbance()))
    return min(runs, key=lambda run: run.disturbance)


def _figures(command: list[str]) -> Figures:
    """Run a contestant in a fresh process. Raises ContestantFailed."""
    try:
        done = subprocess.run(
            command, cwd=places.ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=True, env=_environment()
        )
        figures: Figures = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as failed:
        raise ContestantFailed(_last_line(failed.stderr) or f"exit status {failed.returncode}") from failed
    except (subprocess.TimeoutExpired, ValueError, IndexError) as failed:
        raise ContestantFailed(type(failed).__name__) from failed
    return figures


def _environment() -> dict[str, str]:
    """Settings of OpenMP and Python that would treat contestants differently are taken away."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "PYTHON"))}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


def _brief(line: Line, run: Run | None) -> str:
    if run is None:
        return "failed"
    disturbed = f" (disturbed: {run.disturbance:.0%})" if run.is_disturbed else ""
    return f"{run.figures[line.shown]:.4g} {line.unit}{disturbed}"
