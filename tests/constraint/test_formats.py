"""String formats: nothing that is generated breaks its format, and what people write fits."""

from __future__ import annotations

import json
import re
from datetime import date, datetime

import pytest

from llama_worker._constraint.formats import NATIVE, PATTERNS
from llama_worker._constraint.validation import Validator
from tests.constraint.walks import PROOF, fits, json_constraint, reply

USUAL = {
    "date": ("2024-02-29", "1999-12-31", "0001-01-01"),
    "time": ("12:34:56Z", "00:00:00.123456+05:30"),
    "date-time": ("2024-02-29T12:34:56Z", "2025-01-31T23:59:59.5-08:00"),
    "duration": ("P1Y2M3D", "PT1H30M", "P3W", "P1DT12H"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000",),
    "ipv4": ("127.0.0.1", "255.255.255.255"),
    "ipv6": ("::1", "2001:db8::ff00:42:8329"),
    "hostname": ("localhost", "www.example-site.co.uk"),
    "email": ("jane.doe+tag@mail.example.org",),
    "uri": ("https://example.org/a/b?c=d#e",),
}


@pytest.mark.parametrize("name", sorted({*PATTERNS, *NATIVE}))
def test_format_is_kept_and_what_is_usual_fits(name: str) -> None:
    schema = {"type": "string", "format": name}
    validator = Validator(json.dumps(schema), name)
    for seed in range(1000 if PROOF else 60):
        text = reply(json_constraint(schema, strict=True), seed)
        assert text is None or validator.check(json.loads(text)) is None, text
    for usual in USUAL[name]:
        assert validator.check(usual) is None
        assert fits(json_constraint(schema, strict=True), json.dumps(usual)), usual


def test_dates_are_those_of_the_calendar() -> None:
    pattern = re.compile(PATTERNS["date"])
    for year in range(1000, 10_000):
        assert bool(pattern.match(f"{year:04d}-02-29")) == _is_date(year, 2, 29), year
    for month in range(14):
        for day in range(33):
            assert bool(pattern.match(f"2023-{month:02d}-{day:02d}")) == _is_date(2023, month, day), (month, day)


def test_times_are_those_of_the_clock() -> None:
    pattern = re.compile(PATTERNS["date-time"])
    for hour in range(26):
        for other in (0, 59, 60, 61):
            for text in (f"2024-01-01T{hour:02d}:{other:02d}:00Z", f"2024-01-01T{hour:02d}:00:{other:02d}Z"):
                assert bool(pattern.match(text)) == _is_datetime(text), text


def _is_date(year: int, month: int, day: int) -> bool:
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


def _is_datetime(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
