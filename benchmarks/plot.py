"""The ratios as a picture: SVG written by hand, so that plotting needs no dependency."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

LABEL_WIDTH, PLOT_WIDTH, ROW, TOP = 430, 470, 24, 50
LOWEST, HIGHEST = 0.25, 8.0
COLOURS = {"PASS": "#1a7f37", "FALLS SHORT": "#cf222e", "reported": "#6e7781", "NOT MEASURED": "#6e7781"}
TICKS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def svg(lines: Sequence[Mapping[str, Any]]) -> str:
    """Every ratio with its interval on a logarithmic axis; a bar marks its target."""
    rows = [(line, claim) for line in lines for claim in line["claims"] if claim["is_ratio"] and claim["found"]]
    height = TOP + ROW * len(rows) + 20
    width = LABEL_WIDTH + PLOT_WIDTH + 30
    body = [*_axis(height), *(mark for y, row in enumerate(rows) for mark in _row(TOP + ROW * y + ROW // 2, *row))]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *body, "</svg>"]) + "\n"


def _axis(height: int) -> Iterator[str]:
    yield _text(LABEL_WIDTH, 18, "ratio, logarithmic; dot = median, line = 90 % interval, bar = target", anchor="start")
    for tick in TICKS:
        x, colour = _x(tick), "#57606a" if tick == 1 else "#d0d7de"
        yield _line(x, TOP - 8, x, height - 14, colour, 1)
        yield _text(x, TOP - 12, f"{tick:g}", anchor="middle")


def _row(y: int, line: Mapping[str, Any], claim: Mapping[str, Any]) -> Iterator[str]:
    found, colour = claim["found"], COLOURS[claim["outcome"]]
    yield _text(LABEL_WIDTH - 12, y + 4, f"{_short(line['title'])}: {claim['text']}", anchor="end")
    yield _line(_x(found["low"]), y, _x(found["high"]), y, colour, 3)
    yield f'<circle cx="{_x(found["median"]):.1f}" cy="{y}" r="5" fill="{colour}"/>'
    if claim["target"] is not None:
        x = _x(claim["target"])
        yield _line(x, y - 9, x, y + 9, "#24292f", 2)


def _short(title: str) -> str:
    return title.split(",")[0].split(" over ")[0].split(" beside ")[0]


def _x(ratio: float) -> float:
    share = math.log(min(max(ratio, LOWEST), HIGHEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return LABEL_WIDTH + share * PLOT_WIDTH


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="12" text-anchor="{anchor}">{escape(text)}</text>'
