"""The goals for the templates that llama.cpp ships, and the page that shows them."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from tests.chat import template_table
from tests.chat.template_table import Row
from tests.chat.templates import N_TEMPLATES, shipped_templates

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return template_table.rows()


def test_all_shipped_templates_are_in_the_table(rows: list[Row]) -> None:
    assert len(rows) == len(shipped_templates())
    assert len(rows) >= N_TEMPLATES


def test_nearly_all_render_a_whole_conversation_with_tools(rows: list[Row]) -> None:
    refused = [row.name for row in rows if not row.renders]
    assert len(refused) <= 4, refused


def test_past_calls_come_back_from_nearly_all_renderings(rows: list[Row]) -> None:
    rendered = [row for row in rows if row.renders]
    lost = [row.name for row in rendered if not row.round_trips]
    assert len(lost) <= 0.05 * len(rendered), lost


def test_nested_values_come_back_from_nearly_all_renderings(rows: list[Row]) -> None:
    lost = [row.name for row in rows if not row.nested]
    assert len(lost) <= 0.05 * len(rows), lost


def test_the_grammar_takes_nearly_all_renderings(rows: list[Row]) -> None:
    refused = [row.name for row in rows if not row.accepts_own]
    assert len(refused) <= 0.05 * len(rows), refused


def test_no_grammar_takes_a_call_of_the_wrong_type(rows: list[Row]) -> None:
    assert [row.name for row in rows if not row.rejects_wrong] == []


def test_a_template_is_analysed_in_milliseconds(rows: list[Row]) -> None:
    assert statistics.median(row.milliseconds for row in rows) <= 10


def test_the_page_shows_what_was_computed(rows: list[Row]) -> None:
    assert _without_times(PAGE.read_text("utf-8")) == _without_times(template_table.page(rows))


def _without_times(page: str) -> str:
    return re.sub(r"[\d.]+ \|$|Analysis takes .*|Jinja compiles .*", "", page, flags=re.MULTILINE)
