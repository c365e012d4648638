"""Read the metrics (`metrics.jsonl`) from a run directory and plot them as SVG.

If a crash truncated the last line, that line is dropped; any other invalid line raises an error with its line number.
Figure objects are used instead of pyplot, so that matplotlib's global state does not change.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import durable
from lorakit.errors import MissingExtra, RunError, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
INT8_FILE = "int8.safetensors"  # input scales of a base that is multiplied in int8


@dataclass(frozen=True)
class Metrics:
    """Metrics of a run: one dictionary per line of `metrics.jsonl`, in order."""

    rows: tuple[dict[str, Any], ...]

    @property
    def train(self) -> list[dict[str, Any]]:
        """Return one row per optimizer step, with keys such as step, epoch, loss, learning_rate and grad_norm."""
        return [row for row in self.rows if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return one row per evaluation, with the keys step, eval_loss, eval_perplexity and eval_tokens."""
        return [row for row in self.rows if "eval_loss" in row]


def read_metrics(folder: str | Path) -> Metrics:
    """Read a run's `metrics.jsonl`, if there is one; a RunError for a complete line that is not a metrics row."""
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Metrics(())
    except OSError as cause:
        raise RunError(f"{path}: cannot be read ({cause.strerror}).", where=path) from cause
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # the part after the last newline is empty or truncated
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and isinstance(row.get("step"), int)
        except ValueError:
            whole = False
        if not whole:
            raise RunError(f"{path}, line {number}: not a metrics row.", where=path)
        rows.append(row)
    return Metrics(tuple(rows))


_TRAIN, _EVAL, _INK, _GRID = "#8aa4c8", "#c2410c", "#333333", "#e5e5e5"


def loss_plot(metrics: Metrics, path: str | Path, title: str = "") -> None:
    """Plot training and evaluation loss by optimizer step, of at least one row, and write the plot as an SVG file.

    A MissingExtra, with the pip command, if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        text = 'The loss plot needs matplotlib: pip install "lorakit[report]".'
        raise MissingExtra(text, what="matplotlib") from cause
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    train, evaluations = metrics.train, metrics.evaluations
    if train:
        axes.plot([r["step"] for r in train], [r["loss"] for r in train], color=_TRAIN, linewidth=1.2, label="training")
    if evaluations:
        steps, losses = [r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations]
        axes.plot(steps, losses, color=_EVAL, linewidth=1.8, marker="o", markersize=4, label="evaluation")
        _mark_best(axes, steps, losses)
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.set_title(printable(title, one_line=True), color=_INK, loc="left", fontsize=11, parse_math=False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if train or evaluations:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the font may lack characters of the title
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # savefig would compute the layout twice
    durable.write_bytes(path, buffer.getvalue())


def _mark_best(axes: Axes, steps: list[int], losses: list[float]) -> None:
    best = min(range(len(losses)), key=losses.__getitem__)
    axes.annotate(
        f"{losses[best]:.3f}",
        (steps[best], losses[best]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="center",
        color=_EVAL,
        fontsize=9,
    )
