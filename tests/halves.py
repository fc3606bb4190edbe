"""All tests in two processes at once, one for each core of a small machine: `python -m tests.halves [--cov] [ARGS]`.

One process runs the files that take longest, the other all the rest; both get ARGS, which are pytest's. The rest is
shown as it goes, the long half when it is done, and at the very end what both came to. With `--cov` their coverage
is combined and the gate is applied.
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
LONG: Final = tuple(
    f"tests/worker/test_{name}.py"
    for name in ("exactness", "fuzz_headers", "soak", "state_machine", "stress", "tools_storm")
)


def main(arguments: Sequence[str]) -> int:
    covered = "--cov" in arguments
    with tempfile.TemporaryFile("w+") as output:
        long = _pytest("long", [*LONG, *arguments], covered, output)
        rest = _pytest("rest", [*(f"--ignore={path}" for path in LONG), *arguments], covered, None)
        codes = [rest.wait(), long.wait()]
        output.seek(0)
        said = output.read()
    print(f"\n--- the long half: {', '.join(LONG)}\n{said}", flush=True)
    if covered and not any(codes):
        codes += [
            _coverage("combine", "-q", *(f".coverage.{half}" for half in ("long", "rest"))),
            _coverage("report", "--skip-covered"),
        ]
    print(f"--- the rest ended with {codes[0]}, the long half with {codes[1]}: {said.strip().splitlines()[-1]}")
    return max(map(abs, codes))


def _pytest(half: str, arguments: Sequence[str], covered: bool, output: IO[str] | None) -> subprocess.Popen[bytes]:
    # Neither half sees enough for the gate, and both would write to one file.
    more = ["--cov-report=", "--cov-fail-under=0"] if covered else []
    command = [sys.executable, "-m", "pytest", *arguments, *more]
    environment = {**os.environ, "COVERAGE_FILE": f".coverage.{half}"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT if output else None
    )


def _coverage(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
