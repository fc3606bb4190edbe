"""Running the contestants: a fresh process each time, the contestants of a line in turn, the order rotated."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarks import places
from benchmarks.drive import Figures
from benchmarks.lines import Contestant, Line

TIMEOUT = 600
SIDE_SHOWS = 5
"""Rounds of a contestant that no target rests on."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What a line's contestants printed, by contestant and round (None where one did not take part or failed)."""

    line: Line
    figures: dict[str, list[Figures | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


Runner = Callable[[Contestant], list[str]]


def run_line(line: Line, n_rounds: int, command: Runner, say: Callable[[str], None]) -> Result:
    """All rounds of `line`. A contestant that fails once is left out from then on, with the reason kept."""
    result = Result(line=line, figures={contestant.name: [] for contestant in line.contestants})
    began = time.monotonic()
    for number in range(n_rounds):
        for contestant in _order(line, number):
            figures = None
            if contestant.name not in result.failures and _takes_part(contestant, number, n_rounds):
                figures = _attempt(contestant, command(contestant), result)
                say(f"{line.name} {number + 1}/{n_rounds} {contestant.name}: {_brief(line, figures)}")
            result.figures[contestant.name].append(figures)
    result.seconds = time.monotonic() - began
    return result


def _order(line: Line, number: int) -> Iterator[Contestant]:
    """Another one begins in each round, so that nobody always runs behind the same neighbour."""
    count = len(line.contestants)
    return (line.contestants[(number + i) % count] for i in range(count))


def _takes_part(contestant: Contestant, number: int, n_rounds: int) -> bool:
    return contestant.gates or n_rounds <= SIDE_SHOWS or number % (n_rounds // SIDE_SHOWS) == 0


def _attempt(contestant: Contestant, command: list[str], result: Result) -> Figures | None:
    try:
        done = subprocess.run(
            command, cwd=places.ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=True, env=_environment()
        )
        figures: Figures = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as failed:
        result.failures[contestant.name] = _last_line(failed.stderr) or f"exit status {failed.returncode}"
    except (subprocess.TimeoutExpired, ValueError, IndexError) as failed:
        result.failures[contestant.name] = f"{type(failed).__name__}: {failed}"
    else:
        return figures
    return None


def _environment() -> dict[str, str]:
    """Settings of OpenMP and Python that would treat contestants differently are taken away."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "PYTHON"))}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


def _brief(line: Line, figures: Figures | None) -> str:
    return "failed" if figures is None else f"{figures[line.shown]:.4g} {line.unit}"
