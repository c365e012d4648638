"""The loss plot, and the error without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import MissingExtra
from lorakit.report import Metrics, loss_plot

ROWS = (
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.9},
    {"step": 2, "loss": 2.5},
    {"step": 2, "eval_loss": 2.6},
)


def test_both_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loss_plot(Metrics(ROWS), tmp_path / "loss.svg", "a < b & c")
    text = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    assert text.lstrip().startswith("<?xml")
    assert text.count('<g id="line2d') > 10


def test_a_run_without_evaluations_or_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loss_plot(Metrics(ROWS[1:3]), tmp_path / "loss.svg")
    loss_plot(Metrics(()), tmp_path / "empty.svg")
    assert (tmp_path / "empty.svg").exists()


def test_without_matplotlib_the_pip_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r'The loss plot needs matplotlib: pip install "lorakit\[report\]"'):
        loss_plot(Metrics(ROWS), tmp_path / "loss.svg")
    assert not (tmp_path / "loss.svg").exists()


def test_the_plot_is_that_of_savefig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    def by_savefig(canvas: FigureCanvasSVG, buffer: Any, metadata: Any) -> None:
        monkeypatch.undo()  # savefig calls print_svg
        canvas.figure.savefig(buffer, format="svg", metadata=metadata)

    with matplotlib.rc_context({"svg.hashsalt": "1"}):
        loss_plot(Metrics(ROWS), tmp_path / "loss.svg", "title")
        monkeypatch.setattr(FigureCanvasSVG, "print_svg", by_savefig)
        loss_plot(Metrics(ROWS), tmp_path / "other.svg", "title")
    assert FigureCanvasSVG.print_svg is not by_savefig
    assert (tmp_path / "loss.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
