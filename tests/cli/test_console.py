"""lorakit.cli.console: text, color, tables and JSON on the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.cli import console, main
from lorakit.tables import screen_width
from lorakit.terminal import colored, watched


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


COMMANDS = {
    "data TEXT --model MODEL": "tokenizing: 0 s",
    "eval --data TEXT --model MODEL": "evaluating: 0 s",
    "generate --model MODEL --adapter ADAPTER --prompt hello --max-new-tokens 9 --json": "generating: 0 s",
    "inspect ADAPTER": "lorakit: 0 s",
    "merge --model MODEL --adapter ADAPTER --output-dir NEW": "merging: 0 s",
    "plan MODEL": "lorakit: 0 s",
    "predict --text hello --model PLAIN --task embedding": "predicting: 0 s",
    "train --model MODEL --data TEXT --output-dir NEW --max-steps 1": "lorakit: 0 s",
}


@pytest.fixture
def command(
    request: pytest.FixtureRequest, tiny_model_directory: Path, save_adapter: Callable[..., Path], tmp_path: Path
) -> list[str]:
    """The words of a command, with paths in place of names."""
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 40, encoding="utf-8")
    names = {"TEXT": tmp_path / "text.txt", "MODEL": tiny_model_directory, "NEW": tmp_path / "new"}
    names["ADAPTER"] = save_adapter("one")
    names["PLAIN"] = tmp_path / "plain"  # without a chat template, which embeddings of plain texts must not have
    shutil.copytree(tiny_model_directory, names["PLAIN"], ignore=shutil.ignore_patterns("chat_template.jinja"))
    return [str(names.get(word, word)) for word in request.param.split()]


@pytest.mark.costly
@pytest.mark.parametrize(("command", "said"), COMMANDS.items(), indirect=["command"])
def test_no_command_is_silent_in_a_terminal(command: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with watched("lorakit", 2e-3):
        assert main(command) == 0
    assert said in terminal.getvalue()


SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, *rest):
        if name in ("torch", "transformers", "lorakit.hub", "lorakit.core"):
            sys.meta_path.remove(self)
            time.sleep(5)
sys.meta_path.insert(0, Slow())
"""


def in_terminal(words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run the command line in a pseudo-terminal; return its exit code and what the terminal showed."""
    own, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "lorakit", *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = bytearray()
        with contextlib.suppress(OSError):  # Linux raises EIO at the end
            while piece := os.read(own, 4096):
                shown += piece
    os.close(own)
    return process.returncode, shown.decode()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, indirect=True)
def test_no_command_is_silent_while_it_imports_packages(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, shown = in_terminal(command, {**os.environ, "PYTHONPATH": path})
    assert code == 0 and re.match(r"loading libraries: \d", shown)


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
