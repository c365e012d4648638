"""The counts that all tasks report: their lines in the same order, and the same names as JSON values."""

from __future__ import annotations

from dataclasses import fields

import pytest

from lorakit.data import DataReport, Report
from lorakit.errors import DataError
from lorakit.tasks.encoding import RowReport

COMMON = {"sequences": 9, "tokens": 90, "trained_tokens": 9, "empty_rows": 1, "duplicate_rows": 2, "cut_rows": 3}


@pytest.mark.parametrize("report", [DataReport(16, documents=10, **COMMON), RowReport(16, rows=10, **COMMON)])
def test_the_lines_of_all_tasks(report: Report) -> None:
    report.notes.append("a note")
    total, *lines = report.lines()
    assert "at most 16 tokens" in total and "90 tokens" in total
    empty, cut, twice, *_, note = lines
    assert empty.startswith("1 row left out") and "16 tokens" in cut and twice.startswith("2 duplicate rows")
    assert note == "a note"


@pytest.mark.parametrize("report", [DataReport(16, documents=10, **COMMON), RowReport(16, rows=10, **COMMON)])
def test_the_values_of_all_tasks(report: Report) -> None:
    values = report.as_dict()
    assert values["rows"] == 10
    assert {field.name for field in fields(Report)} < set(values)
    assert {name: values[name] for name in COMMON} == COMMON


def test_only_text_that_is_continued_needs_an_end() -> None:
    RowReport(16, **COMMON).check_end()
    assert RowReport(16, **COMMON).prompt_format is None
    with pytest.raises(DataError) as caught:
        DataReport(16, **COMMON).check_end()
    assert caught.value.field == "allow_missing_end"
    assert "marker" in DataReport(16, **COMMON).lines()[-1]
