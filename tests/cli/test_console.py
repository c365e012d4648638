"""lorakit.cli.console: text, color, tables and JSON on the terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit import terminal
from lorakit.cli import console, main
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data TEXT --model MODEL", "tokenizing: "),
        ("eval --data TEXT --model MODEL", "evaluating: "),
        ("generate --model MODEL --adapter ADAPTER --prompt hello --max-new-tokens 1 --json", "loading: "),
        ("merge --model MODEL --adapter ADAPTER --output-dir NEW", "merging: "),
    ],
)
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_long_work_is_not_silent_in_a_terminal(
    words: str,
    said: str,
    stream: type[io.StringIO],
    tiny_model_directory: Path,
    save_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 40, encoding="utf-8")
    names = {"TEXT": tmp_path / "text.txt", "MODEL": tiny_model_directory, "NEW": tmp_path / "new"}
    names["ADAPTER"] = save_adapter("one")
    monkeypatch.setattr(terminal, "SILENT_SECONDS", 0.001)
    monkeypatch.setattr(sys, "stderr", stream())
    assert main([str(names.get(word, word)) for word in words.split()]) == 0
    assert (said in sys.stderr.getvalue()) is (stream is Terminal)  # type: ignore[attr-defined]


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
