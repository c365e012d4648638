"""lorakit.cli.console: how the command line speaks."""

from __future__ import annotations

import io
import json
import sys

import pytest

from lorakit.cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (3_244_032, "3.24 MB"), (999_700, "1 MB"), (25e9, "25 GB"), (1.5e15, "1,500.0 TB")],
)
def test_bytes_text(count: float, text: str) -> None:
    assert console.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert console.seconds_text(seconds) == text


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    text = console.table(["site", "count"], [["c_attn", "24,576"], ["c_proj", "9"], ["all", "–"]])
    assert text.splitlines() == [
        "site     count",
        "──────  ──────",
        "c_attn  24,576",
        "c_proj       9",
        "all          –",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert console.table(["site"], []).splitlines() == ["site", "────"]


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


def test_color_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.error("x")
    assert sys.stderr.getvalue() == "\033[31merror:\033[0m x\n"
    assert not console.colored(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.error("x")
    assert sys.stderr.getvalue() == "error: x\n"


def test_what_stdout_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.say("ΔW")
    assert raw.getvalue() == b"\\u0394W\n"
