"""lorakit.cli.console: text, color, tables and JSON on the terminal."""

from __future__ import annotations

import io
import json
import sys

import pytest

from lorakit.cli import console
from lorakit.tables import screen_width
from lorakit.terminal import colored


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


def test_color_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.error("x")
    assert sys.stderr.getvalue() == "\033[31merror:\033[0m x\n"
    assert not colored(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.error("x")
    assert sys.stderr.getvalue() == "error: x\n"


def test_what_stdout_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.say("18 → 12 한")
    assert raw.getvalue() == b"18 -> 12 \\ud55c\n"


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"LANG": "en_US.UTF-8"}, "18 → 12"),
        ({}, "18 → 12"),
        ({"LANG": "C"}, "18 -> 12"),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, "18 -> 12"),  # as Python itself sets it
        ({"LANG": "C.UTF-8"}, "18 → 12"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "POSIX"}, "18 -> 12"),
        ({"LANG": "C", "LC_CTYPE": "ko_KR.UTF-8"}, "18 → 12"),
        ({"LANG": "C", "PYTHONIOENCODING": "utf-8"}, "18 → 12"),
    ],
)
def test_the_c_locale_gets_ascii_signs(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LANG", "LC_ALL", "LC_CTYPE", "PYTHONIOENCODING", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    console.say("18 → 12")
    assert capsys.readouterr().out == f"{text}\n"


def test_lines_are_wrapped_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.warning("a message with several words")
    assert sys.stderr.getvalue() == "warning: a message\n  with several words\n"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console.warning("a message with several words")
    assert sys.stderr.getvalue() == "warning: a message with several words\n"


def test_a_terminal_without_a_width_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert screen_width(Terminal()) == 80
    assert screen_width(io.StringIO()) is None
