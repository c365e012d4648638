"""Plots of run folders as SVG: the one door to matplotlib.

Draws with figure objects only, never through pyplot, so that no global state of matplotlib is touched.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lorakit import durable
from lorakit.errors import MissingExtra
from lorakit.report.runs import Metrics

_TRAIN, _EVAL, _INK, _GRID = "#8aa4c8", "#c2410c", "#333333", "#e5e5e5"


def loss_plot(metrics: Metrics, path: str | Path, title: str = "") -> None:
    """Draw training and evaluation loss over the steps.

    Args:
        metrics: Rows of a run; at least one.
        path: The SVG file to write.
        title: A line above the plot.

    Raises:
        MissingExtra: matplotlib is not installed; the message gives the pip command.
        DiskError: The file cannot be written.
    """
    figure_type = _figure_type()
    figure = figure_type(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    train, evaluations = metrics.train, metrics.evaluations
    if train:
        axes.plot([r["step"] for r in train], [r["loss"] for r in train], color=_TRAIN, linewidth=1.2, label="training")
    if evaluations:
        steps, losses = [r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations]
        axes.plot(steps, losses, color=_EVAL, linewidth=1.8, marker="o", markersize=4, label="held out")
        _mark_best(axes, steps, losses)
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.set_title(title, color=_INK, loc="left", fontsize=11)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if train or evaluations:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    durable.write_bytes(path, buffer.getvalue())


def _mark_best(axes: Any, steps: list[int], losses: list[float]) -> None:
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


def _figure_type() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise MissingExtra('The loss plot needs matplotlib: pip install "lorakit[report]".') from cause
    return Figure
