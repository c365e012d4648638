"""Pictures of the command line's output, drawn by `scripts/terminal_pictures.py`."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from .loading import load

PAGE = Path(__file__).parent.parent / "docs" / "command-line.md"


def text_of(svg: str) -> list[str]:
    """Return the text of a picture, in order."""
    found = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    return [text.replace("\xa0", " ").rstrip() for text in found if text.strip()]


def test_a_picture_shows_the_command_and_each_line_as_printed() -> None:
    pictures = load("scripts/terminal_pictures.py")
    drawn = text_of(pictures.picture("lorakit plan gpt2", f"one\n  indented\n{Path.home()}/x & <y>\n"))
    assert drawn == ["lorakit", "$ lorakit plan gpt2", "one", "  indented", "~/x & <y>"]


def test_a_command_runs_in_a_terminal_of_80_columns(tmp_path: Path) -> None:
    pictures = load("scripts/terminal_pictures.py")
    status, output = pictures.run_in_terminal("lorakit plan gpt2 --r 8", str(tmp_path))
    assert status == 0
    assert "trainable" in output
    assert "─" in output, "a terminal gets rules, a pipe does not need them"
    assert max(map(len, output.splitlines())) <= pictures.COLUMNS


def test_a_failing_command_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = load("scripts/terminal_pictures.py")
    monkeypatch.setitem(pictures.COMMANDS, "plan", "lorakit plan --no-such-flag")
    assert pictures.main(["--only", "plan"]) == 1
    assert "no-such-flag" in capsys.readouterr().err


def test_the_page_shows_each_picture_with_its_command() -> None:
    pictures = load("scripts/terminal_pictures.py")
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"\(terminal/(\w+)\.svg\)", page) == list(pictures.COMMANDS)
    for name, command in pictures.COMMANDS.items():
        svg = PAGE.with_name("terminal") / f"{name}.svg"
        assert text_of(svg.read_text(encoding="utf-8"))[1].startswith(f"$ {command}"[:40])
