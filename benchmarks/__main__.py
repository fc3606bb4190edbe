"""python -m benchmarks [--rounds quick|full] [--only LINE,…] [--pairs N] [--build-only] [--no-docs]"""

from __future__ import annotations

import argparse
import sys

from benchmarks import build, lines, report
from benchmarks.lines import Line
from benchmarks.rounds import Result, run_line
from benchmarks.verdicts import Outcome, judge
from llama_worker import inspect_model

CHAT_MODEL, EMBEDDING_MODEL = "demo://smollm2-135m-instruct", "demo://all-minilm-l6-v2"


def main() -> int:
    """Build what is missing, run the lines, report. 1 when something could not be measured."""
    arguments = _arguments()
    build.build_all(_say)
    if arguments.build_only:
        return 0
    models = [inspect_model(model).path for model in (CHAT_MODEL, EMBEDDING_MODEL)]
    results: list[Result] = []
    for line in _chosen(arguments.only):
        n_rounds = arguments.pairs or (line.rounds if arguments.rounds == "full" else line.quick_rounds)
        results.append(run_line(line, n_rounds, lambda contestant: contestant.command(*models), _say))
        if not arguments.no_docs:  # after each line: a run that is interrupted keeps what it has
            report.write(results[-1:], mode=arguments.rounds, versions=build.peer_versions())
    print(report.summary(results))
    return int(any(verdict.outcome is Outcome.NOT_MEASURED for result in results for verdict in judge(result)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="llama-worker and its peers, same work.")
    parser.add_argument("--rounds", choices=("quick", "full"), default="full", help="quick: 5 and 3 rounds a line")
    parser.add_argument("--pairs", type=int, help="so many rounds for every line instead")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(line.name for line in lines.LINES)}")
    parser.add_argument("--build-only", action="store_true", help="get the peers and stop")
    parser.add_argument("--no-docs", action="store_true", help="print, but write nothing into docs/")
    return parser.parse_args()


def _chosen(only: str) -> list[Line]:
    by_name = {line.name: line for line in lines.LINES}
    names = only.split(",") if only else list(by_name)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise SystemExit(f"no such line: {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
