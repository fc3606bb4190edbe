"""All tests in two processes at once, one for each core of a small machine: `python -m tests.halves [--cov] [ARGS]`.

One process runs the two storms, the adapters, templates and constraints, the other all the rest; both get ARGS, which
are pytest's. The rest is shown as it goes, the first half when it is done, and at the very end what both came to. With
`--cov` their coverage is combined and the gate is applied.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

ROOT: Final = Path(__file__).parent.parent
# Half of the CPU time, in `make test` and in `make proof`. The soak comes first: it measures the memory of its process.
FIRST: Final = (
    "tests/worker/test_soak.py",
    "tests/worker/test_tools_storm.py",
    "tests/adapters",
    "tests/chat",
    "tests/constraint",
)


def main(arguments: Sequence[str]) -> int:
    covered = "--cov" in arguments
    with tempfile.TemporaryFile("w+") as output:
        first = _pytest("first", [*FIRST, *arguments], covered, output)
        rest = _pytest("rest", [*(f"--ignore={path}" for path in FIRST), *arguments], covered, None)
        codes = [rest.wait(), first.wait()]
        output.seek(0)
        said = output.read()
    print(f"\n--- the first half: {', '.join(FIRST)}\n{said}", flush=True)
    if covered and not any(codes):
        codes += [
            _coverage("combine", "-q", *(f".coverage.{half}" for half in ("first", "rest"))),
            _coverage("report", "--skip-covered"),
        ]
    print(f"--- the rest ended with {codes[0]}, the first half with {codes[1]}: {said.strip().splitlines()[-1]}")
    return max(map(abs, codes))


def _pytest(half: str, arguments: Sequence[str], covered: bool, output: IO[str] | None) -> subprocess.Popen[bytes]:
    # Neither half sees enough for the gate, and both would write to one file.
    more = ["--cov-report=", "--cov-fail-under=0"] if covered else []
    command = [sys.executable, "-m", "pytest", *arguments, *more]
    environment = {
        **os.environ,
        "COVERAGE_FILE": f".coverage.{half}",
        # A thread of OpenMP that spins at a barrier takes the core from the one that it waits for.
        "OMP_WAIT_POLICY": "passive",
        # glibc gives each thread whichever heap is free; how that spreads is 10 MiB of noise to the soak.
        "MALLOC_ARENA_MAX": "1",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT if output else None
    )


def _coverage(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
