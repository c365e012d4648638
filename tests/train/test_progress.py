"""Progress of a run: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from lorakit.train import progress as module
from lorakit.train.progress import LiveProgress, PlainProgress, Progress, progress_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "tokens_per_second": 1234.5, "peak_rss_bytes": 1_500_000_000}


EVALUATION = {"step": 2, "eval_loss": 1.5, "eval_perplexity": 4.48, "eval_tokens": 12345}


def test_plain_lines_are_few_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with PlainProgress(stream) as progress:
        progress.begin(0, 30)
        for step in range(1, 31):
            progress.train_row(_row(step))
        progress.eval_row(EVALUATION)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [f"{step}/30" for step in (*range(1, 30, 4), 30)]
    assert lines[0] == "step 1/30  loss 2.5000  1,234 tokens/s  peak 1.50 GB  29 s left"
    assert lines[-1] == "evaluation at step 2: loss 1.5000, perplexity 4.48 over 12,345 tokens"


def test_a_terminal_gets_a_bar_with_everything_on_it() -> None:
    stream = Terminal()
    with progress_for(stream) as progress:
        assert isinstance(progress, LiveProgress)
        progress.say("[bold]no markup[/bold]")
        progress.begin(0, 3)
        progress.busy("evaluating")
        progress.eval_row(EVALUATION)
        for step in range(1, 4):
            progress.train_row(_row(step))
    text = stream.getvalue()
    for part in ("[bold]no markup[/bold]", "loss 2.5000", "1,234 tok/s", "peak 1.50 GB", "3/3", "perplexity 4.48"):
        assert part in text


def test_anything_else_gets_lines() -> None:
    assert isinstance(progress_for(io.StringIO()), PlainProgress)


def test_silence_takes_everything() -> None:
    with Progress() as progress:
        progress.reading("x", 0, 1)
        progress.begin(0, 1)
        progress.busy("x")
        progress.train_row(_row(1))
        progress.eval_row(EVALUATION)
        progress.say("x")


def test_tokenizing_is_told_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with PlainProgress(stream) as progress:
        for done in range(25):
            progress.reading("training data", done * 10_000_000, 240_000_000)
    assert stream.getvalue().splitlines() == [
        "tokenizing training data: 40.0 MB of 240 MB (17%)",
        "tokenizing training data: 80.0 MB of 240 MB (33%)",
        "tokenizing training data: 120 MB of 240 MB (50%)",
        "tokenizing training data: 160 MB of 240 MB (67%)",
        "tokenizing training data: 200 MB of 240 MB (83%)",
    ]


def test_a_terminal_gets_a_bar_of_bytes_that_goes() -> None:
    stream = Terminal()
    with progress_for(stream) as progress:
        progress.reading("small data", 10, 100)
        assert stream.getvalue() == ""
        progress.reading("training data", 1_000_000, 4_000_000)
        progress.reading("training data", 3_000_000, 4_000_000)
        progress.say("a note")
        progress.reading("training data", 4_000_000, 4_000_000)
        progress.begin(0, 1)
        progress.train_row(_row(1))
    text = stream.getvalue()
    for part in ("tokenizing training data", "/4.0 MB", "a note", "1/1"):
        assert part in text


def test_details_are_printed_on_request() -> None:
    for verbose in (False, True):
        plain, live = io.StringIO(), Terminal()
        for progress in (PlainProgress(plain, verbose=verbose), LiveProgress(live, verbose=verbose), Progress()):
            progress.detail("a detail")
        assert ("a detail" in plain.getvalue(), "a detail" in live.getvalue()) == (verbose, verbose)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"LC_ALL": "C"}])
def test_a_terminal_that_cannot_show_a_bar_gets_lines(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    progress = progress_for(stream)
    assert isinstance(progress, PlainProgress)
    progress.say("a line of more than forty columns is wrapped")
    assert stream.getvalue() == "a line of more than forty columns is\n  wrapped\n"


def test_the_bar_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with progress_for(stream) as progress:
        progress.begin(0, 1000)
        progress.train_row({**_row(999), "tokens_per_second": 1234.0})
        progress.busy("evaluating")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", stream.getvalue())]
    assert max(map(len, lines)) <= 80
    assert any("999/1000" in line and line.rstrip().endswith("left") and "1.50 GB" in line for line in lines)
