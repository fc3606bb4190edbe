"""What the reader sees: a table on the terminal and in docs/benchmarks.md, every figure in docs/benchmarks.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks import places, plot
from benchmarks.intervals import Interval
from benchmarks.lines import CORES
from benchmarks.rounds import Result
from benchmarks.verdicts import Outcome, Verdict, judge, shown

INTRODUCTION = """# Benchmarks

llama-worker and its peers on the same work, on one machine: `make bench` (see
[benchmarks/README.md](../benchmarks/README.md) for how each line is measured). Each line is one run; when that was
stands beneath it. Ratios are medians over rounds with their 90 % intervals; each round compares processes that ran
next to each other. A line passes when the interval reaches the target and the median is within 0.02 of it, or within
2 % where the target is a time.

![ratios](benchmarks.svg)
"""


def write(results: Sequence[Result], *, mode: str, versions: Mapping[str, str], docs: Path = places.DOCS) -> None:
    """Write docs/benchmarks.{json,md,svg}; lines that did not run this time keep what an earlier run found."""
    path = docs / "benchmarks.json"
    earlier = json.loads(path.read_text())["lines"] if path.exists() else {}
    machine = _machine(versions)
    lines = earlier | {result.line.name: _line(result, mode, machine) for result in results}
    docs.mkdir(exist_ok=True)
    path.write_text(json.dumps({"lines": lines}, indent=1, ensure_ascii=False) + "\n")
    (docs / "benchmarks.md").write_text(markdown(list(lines.values())))
    (docs / "benchmarks.svg").write_text(plot.svg(list(lines.values())))


def summary(results: Sequence[Result]) -> str:
    """One row a claim, for the terminal."""
    return "\n".join(_terminal_row(result, verdict) for result in results for verdict in judge(result))


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join([INTRODUCTION, *(_section(line) for line in lines)])


def _line(result: Result, mode: str, machine: Mapping[str, str]) -> dict[str, Any]:
    line = result.line
    return {
        "title": line.title,
        "unit": line.unit,
        "mode": mode,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": dict(machine),
        "seconds": round(result.seconds),
        "disturbed_runs": result.disturbed,
        "shown": {name: _numbers(shown(result, name)) for name in result.runs},
        "claims": [_claim(verdict) for verdict in judge(result)],
        "failures": result.failures,
        "rounds": {
            name: [None if run is None else run.figures | {"disturbance": run.disturbance} for run in runs]
            for name, runs in result.runs.items()
        },
    }


def _claim(verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "text": claim.text,
        "contestant": claim.top.contestant,
        "target": claim.target,
        "at_most": claim.at_most,
        "is_ratio": claim.bottom is not None,
        "outcome": verdict.outcome.value,
        "verdict": verdict.text,
        "found": _numbers(verdict.interval),
    }


def _numbers(found: Interval | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {"median": found.median, "low": found.low, "high": found.high, "n": found.n, "coverage": found.coverage}


def _section(line: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in line["machine"].items())
    disturbed = f"; {line['disturbed_runs']} runs left out, disturbed by others" if line["disturbed_runs"] else ""
    return "\n".join(
        [
            f"\n## {line['title']}\n",
            f"| contestant | {line['unit']} (median) | 90 % interval | rounds |",
            "|---|---|---|---|",
            *(_contestant_row(name, found) for name, found in line["shown"].items()),
            "",
            "| llama-worker | median | 90 % interval | target | |",
            "|---|---|---|---|---|",
            *(_claim_row(claim) for claim in line["claims"]),
            "",
            *(f"{name} failed: `{reason}`\n" for name, reason in line["failures"].items()),
            f"{line['mode']}, {line['measured']}{disturbed}; {machine}.",
        ]
    )


def _contestant_row(name: str, found: Mapping[str, float] | None) -> str:
    if found is None:
        return f"| {name} | – | – | 0 |"
    return f"| {name} | {found['median']:.4g} | {found['low']:.4g} … {found['high']:.4g} | {found['n']} |"


def _claim_row(claim: Mapping[str, Any]) -> str:
    found = claim["found"]
    if found is None:
        return f"| {claim['text']} | – | – | {_target(claim)} | {claim['verdict']} |"
    spread = f"{found['low']:.3g} … {found['high']:.3g}"
    return f"| {claim['text']} | {found['median']:.3g} | {spread} | {_target(claim)} | {claim['verdict']} |"


def _target(claim: Mapping[str, Any]) -> str:
    if claim["target"] is None:
        return ""
    return f"{'≤' if claim['at_most'] else '≥'} {claim['target']:g}"


def _terminal_row(result: Result, verdict: Verdict) -> str:
    claim, found = verdict.claim, verdict.interval
    text = f"{result.line.name:16} {claim.text:50}"
    if found is None:
        return f"{text} {_reasons(result)} {Outcome.NOT_MEASURED}"
    goal = _target({"target": claim.target, "at_most": claim.at_most})
    return f"{text} {found.median:7.3f}  [{found.low:.3f} … {found.high:.3f}] n={found.n:<2} {goal:7} {verdict.text}"


def _reasons(result: Result) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in result.failures.items())


def _machine(versions: Mapping[str, str]) -> dict[str, str]:
    cpu = _cpu_name() or platform.machine()
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {"CPU": cpu, "cores": str(CORES), "memory": memory, "Python": platform.python_version(), **versions}


def _cpu_name() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), "")
