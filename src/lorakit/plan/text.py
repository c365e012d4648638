"""A plan as plain text: aligned tables and sentences, no colour.

Knows nothing about terminals; the numbers are those of `Plan`, rounded for reading.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lorakit.plan.estimating import Method, Plan
from lorakit.plan.ranks import RankTable

WIDTH = 100
"""Columns at which sentences are broken."""


def render(plan: Plan) -> str:
    """The whole plan as text.

    Args:
        plan: The plan.

    Returns:
        Lines joined by newlines, without one at the end.
    """
    parts = [_head(plan), _sites(plan), _why(plan), _memory(plan), _files(plan), _beside(plan)]
    if plan.ranks is not None:
        parts.append(_ranks(plan.ranks))
    parts.append("\n".join(_wrapped(f"Note: {note}") for note in plan.notes))
    return "\n\n".join(part for part in parts if part)


def summary(plan: Plan) -> list[str]:
    """The plan in a few lines, for the start of a run.

    Args:
        plan: The plan.

    Returns:
        Sentences: trainable numbers, memory, sizes, and times where a speed is known.
    """
    lines = [
        _trainable(plan),
        f"planned memory: {bytes_text(plan.lora.memory.peak_bytes)} at the peak, of which weights "
        f"{bytes_text(plan.lora.memory.bytes_of('weights'))}; full fine-tuning would need "
        f"{bytes_text(plan.full.memory.peak_bytes)}",
        f"adapter on disk: {bytes_text(plan.lora.saved_bytes)}; the full model: {bytes_text(plan.full.saved_bytes)}",
    ]
    if plan.lora.tokens_per_second is not None:
        lines.append(f"planned speed: {_times(plan, plan.lora)}")
    return lines


def bytes_text(count: float) -> str:
    """A number of bytes in decimal units, such as "3.2 MB" or "498 MB".

    Args:
        count: Bytes.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return (
                f"{count:.0f} {unit}"
                if unit == "B" or abs(count) >= 99.95
                else f"{count:.{1 + (unit == 'GB')}f} {unit}"
            )
        count /= 1000
    return f"{count:,.2f} TB"


def seconds_text(seconds: float) -> str:
    """A length of time: "0.4 s", "42 s", "3 min 20 s", "2.5 hours", "12 days".

    Args:
        seconds: The length.
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} hours" if seconds < 96 * 3600 else f"{seconds / 86400:.1f} days"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    """Cells in aligned columns under a header.

    Args:
        header: A title per column.
        rows: As many cells each.
        text_columns: Columns that are aligned to the left; the others hold numbers.

    Returns:
        The lines, joined by newlines.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _trainable(plan: Plan) -> str:
    counted = plan.counted
    return f"trainable: {counted.trainable:,} of {counted.base:,} ({100 * counted.share:.2f} %) of the base"


def _head(plan: Plan) -> str:
    shape, job = plan.shape, plan.job
    again = {"none": "", "layers": ", gradient checkpointing"}.get(job.recompute, f", {job.recompute} computed again")
    forwards = "accelerated" if job.accelerated else "not accelerated"
    steps = "" if job.steps is None else f" · {job.steps:,} steps, {job.steps * job.step_tokens:,} tokens"
    return "\n".join(
        [
            f"{shape.name}: {shape.architecture}, {shape.layers} layers, width {shape.hidden:,}, "
            f"vocabulary {shape.vocab:,}{', tied head' if shape.tied else ''}",
            _wrapped(f"shape from: {shape.source}"),
            f"job: {job.batch_rows} × {job.length_tokens:,} tokens a batch, {job.accumulation} a step, "
            f"{job.dtype}{again}, {forwards}{steps}",
            _trainable(plan),
        ]
    )


def _sites(plan: Plan) -> str:
    groups = plan.counted.groups()
    rows = [
        [g.label, g.kind, f"{g.out_features:,} × {g.in_features:,}", f"{g.sites:,}", f"{g.rank}", f"{g.scale:g}",
         f"{g.each:,}", f"{g.trainable:,}"]
        for g in groups
    ]  # fmt: skip
    for path, numbers in plan.counted.saved.items():
        rows.append([path, "copied whole", "", "1", "", "", f"{numbers:,}", f"{numbers:,}"])
    for path, numbers in plan.counted.rows.items():
        rows.append([path, "some rows", "", "1", "", "", f"{numbers:,}", f"{numbers:,}"])
    if plan.counted.biases:
        rows.append(["biases of the base", "", "", "", "", "", "", f"{plan.counted.biases:,}"])
    rows.append(["total", "", "", f"{len(plan.counted.sites):,}", "", "", "", f"{plan.counted.trainable:,}"])
    return table(["site", "kind", "out × in", "sites", "r", "scale", "each", "trainable"], rows, text_columns=(0, 1))


def _why(plan: Plan) -> str:
    return "why:\n" + "\n".join(_wrapped(sentence, "  ") for sentence in plan.reasons)


def _memory(plan: Plan) -> str:
    needs = plan.lora.memory
    rows = [
        [line.cause, bytes_text(line.size_bytes), bytes_text(line.at_peak_bytes), line.formula] for line in needs.lines
    ]
    rows.append(["peak", "", bytes_text(needs.peak_bytes), f"when {needs.peak_moment}"])
    return table(["memory", "largest", "at the peak", "bytes ="], rows, text_columns=(0, 3))


def _files(plan: Plan) -> str:
    rows = [[file.what, bytes_text(file.size_bytes), file.formula] for file in plan.files]
    return table(["on disk", "size", "bytes ="], rows, text_columns=(0, 2))


def _beside(plan: Plan) -> str:
    lora, full = plan.lora, plan.full
    rows = [
        ["trainable numbers", f"{lora.trainable:,}", f"{full.trainable:,}"],
        ["memory at the peak", bytes_text(lora.memory.peak_bytes), bytes_text(full.memory.peak_bytes)],
        *(
            [f"  {cause}", bytes_text(lora.memory.bytes_of(cause)), bytes_text(full.memory.bytes_of(cause))]
            for cause in ("weights", "gradients", "optimizer", "activations")
        ),
        ["FLOPs per token, forward", _flops(lora.flops.forward), _flops(full.flops.forward)],
        ["FLOPs per token, backward", _flops(lora.flops.backward), _flops(full.flops.backward)],
    ]
    if lora.flops.recomputed:
        rows.append(["FLOPs per token, recomputed", _flops(lora.flops.recomputed), _flops(full.flops.recomputed)])
    rows += [
        ["FLOPs per token", _flops(lora.flops.total), _flops(full.flops.total)],
        ["saved result", bytes_text(lora.saved_bytes), bytes_text(full.saved_bytes)],
        ["resumable checkpoint", bytes_text(lora.resumable_bytes), bytes_text(full.resumable_bytes)],
    ]
    if lora.tokens_per_second is not None and full.tokens_per_second is not None:
        rows.append(["tokens per second", f"{lora.tokens_per_second:,.0f}", f"{full.tokens_per_second:,.0f}"])
        rows.append(["seconds a step", _optional(lora.step_seconds), _optional(full.step_seconds)])
    if lora.run_seconds is not None:
        rows.append([f"{plan.job.steps:,} steps", _optional(lora.run_seconds), _optional(full.run_seconds)])
    told = "" if plan.speed is None else f"\nspeed: {plan.speed.source}"
    return table(["", "LoRA", "full fine-tuning"], rows) + told


def _ranks(ranks: RankTable) -> str:
    rows = [
        [", ".join(row.labels), f"{row.out_features:,} × {row.in_features:,}", f"{row.sites:,}",
         *(f"{each:,}" for each in row.each)]
        for row in ranks.rows
    ]  # fmt: skip
    rows.append(
        ["total of all sites", "", f"{sum(row.sites for row in ranks.rows):,}", *map("{:,}".format, ranks.totals)]
    )
    rows.append(["share of the base", "", "", *(f"{100 * share:.2f} %" for share in ranks.shares)])
    return table(["one site, by rank", "out × in", "sites", *(f"r={rank}" for rank in ranks.ranks)], rows)


def _times(plan: Plan, method: Method) -> str:
    text = f"{method.tokens_per_second:,.0f} tokens/s, {_optional(method.step_seconds)} a step"
    if method.run_seconds is not None:
        text += f", {_optional(method.run_seconds)} for {plan.job.steps:,} steps"
    return text


def _optional(seconds: float | None) -> str:
    return "" if seconds is None else seconds_text(seconds)


def _flops(number: float) -> str:
    for power, unit in ((12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:,.2f} {unit}"
    return f"{number:,.0f}"


def _wrapped(sentence: str, indent: str = "") -> str:
    return textwrap.fill(
        sentence, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
