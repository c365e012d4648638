"""lorakit.tables: one form for sizes, durations, percentages, counts and columns."""

from __future__ import annotations

import math

import pytest

from lorakit.tables import (
    columns,
    display_width,
    encodable,
    format_bytes,
    format_count,
    format_percent,
    format_quantity,
    format_rate,
    format_seconds,
    wrap,
)

NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (-0.2, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.4, "999 B"),
        (999.5, "1.0 kB"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (3_244_032, "3.2 MB"),
        (497_759_232, "498 MB"),
        (999_700, "1.0 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (1_493_277_696, "1.49 GB"),
        (9_994_000_000, "9.99 GB"),
        (9_996_000_000, "10.0 GB"),
        (25e9, "25.0 GB"),
        (137e9, "137 GB"),
        (2.5e12, "2.50 TB"),
        (1.5e15, "1.50 PB"),
        (4e18, "4,000 PB"),
        (-3_244_032, "-3.2 MB"),
        (NAN, "unknown"),
        (INFINITY, "unknown"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 FLOP/s"),
        (1.5, "1.5 FLOP/s"),
        (999.6, "1.00 kFLOP/s"),
        (258.14e6, "258 MFLOP/s"),
        (409.4e9, "409 GFLOP/s"),
        (10.4e9, "10.4 GFLOP/s"),
        (999.6e9, "1.00 TFLOP/s"),
        (-2e6, "-2.00 MFLOP/s"),
        (NAN, "unknown"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert format_quantity(value, "FLOP/s") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0 tokens/s"), (4.24, "4.2 tokens/s"), (9.96, "10 tokens/s"), (3100.4, "3,100 tokens/s"), (NAN, "unknown")],
)
def test_rates(value: float, text: str) -> None:
    assert format_rate(value, "tokens/s") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0001, "<1 ms"),
        (0.04, "40 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.1 s"),
        (0.41, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (60, "1 min"),
        (119.6, "2 min"),
        (200, "3 min 20 s"),
        (600, "10 min"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (7199, "2 h"),
        (9000, "2 h 30 min"),
        (86_399, "1 d"),
        (1e6, "11 d 14 h"),
        (1e9, "11,574 d 2 h"),
        (-200, "-3 min 20 s"),
        (NAN, "unknown"),
        (-INFINITY, "unknown"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("fraction", "digits", "text"),
    [
        (0, 2, "0.00%"),
        (-0.0, 2, "0.00%"),
        (1, 2, "100.00%"),
        (0.01816, 2, "1.82%"),
        (0.6, 0, "60%"),
        (0.9958, 1, "99.6%"),
        (0.00001, 2, "<0.01%"),
        (-0.00001, 2, ">-0.01%"),
        (0.99999, 2, ">99.99%"),
        (1 - 1e-7, 2, "100.00%"),
        (1e-7, 2, "0.00%"),
        (0.999, 0, ">99%"),
        (0.004, 0, "<1%"),
        (-0.0182, 2, "-1.82%"),
        (12.5, 0, "1250%"),
        (NAN, 2, "unknown"),
    ],
)
def test_percentages(fraction: float, digits: int, text: str) -> None:
    assert format_percent(fraction, digits) == text


def test_counts() -> None:
    assert format_count(0, "row") == "0 rows"
    assert format_count(1, "row") == "1 row"
    assert format_count(3000, "row") == "3,000 rows"
    assert format_count(2, "entry", "entries") == "2 entries"


def test_columns_align_words_left_and_numbers_right() -> None:
    text = columns(["site", "size", "n"], [["c_attn", "24.6 kB", "<1"], ["c_proj", "9 B", "-12"], ["all", "–", ""]])
    assert text.splitlines() == [
        "site       size    n",
        "──────  ───────  ───",
        "c_attn  24.6 kB   <1",
        "c_proj      9 B  -12",
        "all           –",
    ]


def test_columns_can_be_told_what_is_text() -> None:
    text = columns(["n", "formula"], [["1,000", "4 × 250"], ["2", "2"]], left=[1])
    assert text.splitlines()[2:] == ["1,000  4 × 250", "    2  2"]


def test_columns_without_rows_are_a_header() -> None:
    assert columns(["site", "n"], []).splitlines() == ["site  n", "────  ─"]


def test_columns_count_wide_and_combining_characters() -> None:
    lines = columns(["이름", "n"], [["한국어", "1"], ["日本", "22"], ["e\u0301", "333"]]).splitlines()
    assert {display_width(line) for line in lines} == {11}
    assert lines[2] == "한국어    1"


def test_a_last_column_of_text_is_wrapped_between_words() -> None:
    lines = columns(["n", "why"], [["1", "one two three four five six seven"], ["2", "short"]], width=20).splitlines()
    assert lines == ["n  why", "─  " + "─" * 17, "1  one two three", "   four five six", "   seven", "2  short"]
    assert columns(["n", "why"], [["1", "x" * 40]], width=20).splitlines()[2] == "1  " + "x" * 40


def test_a_header_may_have_no_columns_of_numbers() -> None:
    with pytest.raises(ValueError, match="zip"):
        columns(["a", "b"], [["only one"]])


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("short", ["short"]),
        ("one two three four five", ["one two three", "  four five"]),
        ("- one two three four", ["- one two three", "  four"]),
        ("  one two three four", ["  one two three", "    four"]),
        ("base   one two three", ["base   one two", "       three"]),
        ("/a/path/longer/than/that x", ["/a/path/longer/than/that", "  x"]),
        ("한국어 문장은 길다", ["한국어 문장은", "  길다"]),
    ],
)
def test_wrapping_breaks_between_words_only(line: str, lines: list[str]) -> None:
    assert wrap(line, 15).split("\n") == lines


def test_wrapping_keeps_lines_apart() -> None:
    assert wrap("a b c d\n\ne f", 4) == "a b\n  c\n  d\n\ne f"


def test_signs_have_an_ascii_form() -> None:
    assert encodable("18 → 12 × 4 ‖ΔW‖ …", "ascii") == "18 -> 12 x 4 |dW| ..."
    assert encodable("18 → 12", "utf-8") == "18 → 12"
    assert encodable("18 → 한", "utf-8", ascii_signs=True) == "18 -> 한"
    assert encodable("한", "ascii") == "\\ud55c"
    assert encodable("× →", "latin-1") == "x ->"
