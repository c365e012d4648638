"""lorakit.terminal.watched: no command is silent for long on a terminal."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lorakit.terminal import drawing_console, hidden_stderr, watched, working, write_line, write_model_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def has(self, text: str, seconds: float = 5.0) -> bool:
        """Return whether a text appears within some seconds."""
        end = time.monotonic() + seconds
        while text not in self.getvalue() and time.monotonic() < end:
            time.sleep(0.005)
        return text in self.getvalue()


@contextlib.contextmanager
def watching(command: str, seconds: float = 0.02) -> Iterator[Terminal]:
    """Watch a block whose two streams are one terminal."""
    found = Terminal()
    with contextlib.redirect_stdout(found), contextlib.redirect_stderr(found), watched(command, seconds):
        yield found


def test_the_innermost_block_names_what_is_done() -> None:
    with watching("lorakit merge") as terminal:
        assert terminal.has("lorakit merge: 0 s\n")
        with working("merging"):
            assert terminal.has("merging: 0 s\n")
            with working("loading base"), hidden_stderr():
                sys.stderr.write("a progress bar")
                assert terminal.has("loading base: 0 s\n")
            terminal.truncate(0)
            assert terminal.has("merging: 0 s\n")
    assert "progress bar" not in terminal.getvalue()


def test_an_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(0.5)")
    monkeypatch.syspath_prepend(tmp_path)
    with watching("lorakit eval") as terminal:
        __import__("slow_to_import")
    assert "loading libraries: 0 s\n" in terminal.getvalue()


@pytest.mark.costly(cases=0)
def test_nothing_is_said_while_something_else_is_written() -> None:
    with watching("lorakit eval", 1.5) as terminal:
        for write in (write_line, partial(write_line, stream=sys.stderr), write_model_text):
            for _ in range(12):
                write("text\n")
                time.sleep(0.05)
    assert "lorakit eval" not in terminal.getvalue()


def test_nothing_is_said_in_the_middle_of_a_line() -> None:
    with watching("lorakit generate") as terminal:
        write_model_text("The first half")
        time.sleep(0.2)
        write_model_text(" and the second.\n")
        assert terminal.has("lorakit generate: 0 s\n")
    assert "The first half and the second.\nlorakit generate: 0 s\n" in terminal.getvalue()


def test_nothing_is_said_below_a_live_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    monkeypatch.setenv("TERM", "xterm")
    with watching("lorakit train") as terminal:
        with Progress(console=drawing_console(), transient=True) as bar:
            bar.add_task("training", total=9)
            before = len(terminal.getvalue())
            time.sleep(0.3)
            assert "lorakit train" not in terminal.getvalue()[before:]
        assert terminal.has("lorakit train: 0 s\n")  # the drawing was removed: the line is not unfinished


def test_nothing_is_said_while_the_user_is_asked() -> None:
    with watching("lorakit generate") as terminal:
        with working("reading"), working(None):
            time.sleep(0.1)
            before = terminal.getvalue()
            time.sleep(0.2)
            assert terminal.getvalue() == before
        assert terminal.has("lorakit generate: 0 s\n")


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    threads, streams = threading.active_count(), (sys.stdout, sys.stderr)
    with contextlib.suppress(KeyboardInterrupt), watching("lorakit eval") as terminal:
        assert threading.active_count() == threads + 1
        if fails:
            raise KeyboardInterrupt
    assert threading.active_count() == threads and (sys.stdout, sys.stderr) == streams
    with working("merging"):
        time.sleep(0.1)
    assert "merging" not in terminal.getvalue()


def test_a_stream_that_is_no_terminal_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with watched("lorakit eval", 0.001):
            assert threading.active_count() == threads and sys.stderr is stream


def test_without_stdout_it_stays_away() -> None:
    terminal = Terminal()
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(terminal), watched("lorakit eval", 0.02):
        assert sys.stdout is None and terminal.has("lorakit eval: 0 s\n")
