"""From figures to verdicts: the ratio of each round, its median and interval, and whether the target is met."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from benchmarks.intervals import CONFIDENCE, Interval, interval
from benchmarks.lines import Claim, Figure
from benchmarks.rounds import Result


class Outcome(StrEnum):
    PASS = "PASS"
    FALLS_SHORT = "FALLS SHORT"
    REPORTED = "reported"
    NOT_MEASURED = "NOT MEASURED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A claim and what the rounds say of it."""

    claim: Claim
    interval: Interval | None
    outcome: Outcome

    @property
    def is_indicative(self) -> bool:
        """Judged, but on too few undisturbed rounds for a 90 % interval."""
        judged = self.outcome in (Outcome.PASS, Outcome.FALLS_SHORT)
        return judged and self.interval is not None and self.interval.coverage < CONFIDENCE

    @property
    def text(self) -> str:
        return f"{self.outcome} (too few rounds)" if self.is_indicative else str(self.outcome)


def judge(result: Result) -> list[Verdict]:
    return [_verdict(claim, _pairs(claim, result)) for claim in result.line.claims]


def shown(result: Result, contestant: str) -> Interval | None:
    """The line's main figure of one contestant."""
    figures = [value for value in _figures(result, Figure(contestant=contestant, name=result.line.shown)) if value]
    return interval(figures) if figures else None


def _verdict(claim: Claim, figures: list[float]) -> Verdict:
    if not figures:
        return Verdict(claim=claim, interval=None, outcome=Outcome.NOT_MEASURED)
    found = interval(figures)
    return Verdict(claim=claim, interval=found, outcome=_outcome(claim, found))


def _outcome(claim: Claim, found: Interval) -> Outcome:
    if claim.target is None:
        return Outcome.REPORTED
    if claim.at_most:
        met = found.low <= claim.target and found.median <= claim.target + claim.slack
    else:
        met = found.high >= claim.target and found.median >= claim.target - claim.slack
    return Outcome.PASS if met else Outcome.FALLS_SHORT


def _pairs(claim: Claim, result: Result) -> list[float]:
    """The claim's figure in each round in which both sides took part and others disturbed neither."""
    tops = _figures(result, claim.top)
    if claim.bottom is None:
        return [top for top in tops if top is not None]
    bottoms = _figures(result, claim.bottom)
    return [top / bottom for top, bottom in zip(tops, bottoms, strict=True) if top is not None and bottom]


def _figures(result: Result, figure: Figure) -> list[float | None]:
    """None where the contestant did not take part or was disturbed."""
    return [
        None if run is None or run.is_disturbed else run.figures[figure.name] for run in result.runs[figure.contestant]
    ]
