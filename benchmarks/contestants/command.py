"""What every contestant does with its command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping

from benchmarks.drive import Figures


def main(lines: Mapping[str, Callable[..., Figures]]) -> None:
    """Run the line named first with the remaining arguments, and print its figures as the last line."""
    name, *arguments = sys.argv[1:]
    print(json.dumps(lines[name](*arguments)), flush=True)
