"""Format a plan as plain text: the summary first, then tables, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterable

from lorakit.plan.choosing import ParallelPlan
from lorakit.plan.estimating import Plan, length_warnings
from lorakit.plan.parallel import RankPlan
from lorakit.plan.params import RankTable
from lorakit.tables import (
    columns,
    format_bytes,
    format_count,
    format_percent,
    format_quantity,
    format_rate,
    format_seconds,
    wrap,
)
from lorakit.targets.experts import LEFT_OUT

WIDTH = 80
"""Width in columns at which lines are wrapped."""


def render(plan: Plan, *, verbose: bool = False, notes: tuple[str, ...] = ()) -> str:
    """Return a plan as text: summary and sites, then memory use by category.

    `verbose` adds formulas, FLOPs, notes and the derivation of the counts; `notes` are further lines of the summary.
    """
    warnings = [f"warning: {message}" for message in (*length_warnings(plan.shape, plan.job), *plan.counted.missing)]
    parts = [_paragraph(_head(plan)), _paragraph([*_summary(plan), *notes]), _paragraph(warnings), _sites(plan)]
    if not verbose:  # otherwise they are among the reasons
        parts.append(_paragraph([note.text for note in plan.counted.notes if note.kind == LEFT_OUT]))
    if plan.ranks is not None:
        parts.append(_ranks(plan.ranks))
    parts.append(_methods(plan))
    if verbose:
        parts += [_why(plan), _memory(plan), _files(plan), _flops(plan)]
        parts.append(_paragraph([f"note: {note}" for note in plan.notes]))
    return "\n\n".join(part for part in parts if part)


def summary(plan: Plan) -> list[str]:
    """Return a few lines for the start of a run: trainable parameters, memory and, if a speed is known, the time."""
    needs, gaps = plan.lora.memory, plan.lora.memory.bytes_of("malloc")
    parts = [f"weights {format_bytes(needs.bytes_of('weights'))}"]
    parts += [f"gaps of malloc {format_bytes(gaps)}"] if gaps else []
    lines = [
        f"trainable: {_trainable(plan)}",
        f"estimated peak memory: {format_bytes(needs.peak_bytes)} ({', '.join(parts)})",
    ]
    if plan.lora.tokens_per_second is not None:
        lines.append(f"estimated time: {_times(plan)}")
    return lines


def details(plan: Plan) -> list[str]:
    """Return the lines that a run prints with `--verbose` in addition to `summary`."""
    return [
        f"full fine-tuning: estimated peak memory {format_bytes(plan.full.memory.peak_bytes)}",
        f"adapter on disk: {format_bytes(plan.lora.saved_bytes)} (full model {format_bytes(plan.full.saved_bytes)})",
    ]


GOOD_SCALING = 0.9
"""Scaling for which the time of a step is printed if no speed is known."""


def render_parallel(plan: ParallelPlan) -> str:
    """Return a plan of several processes as text: the choice, then what a process holds and sends in each way."""
    cluster, ranks = plan.cluster, plan.ranks
    within = f" ({cluster.link.name})" if cluster.local > 1 else ""
    between = f", {cluster.nodes} nodes ({cluster.network.name})" if cluster.nodes > 1 else ""
    memory = "" if plan.limit_bytes is None else f", {format_bytes(plan.limit_bytes)} each"
    head = [
        f"processes    {cluster.processes}: {cluster.local} per node{within}{between}{memory}",
        f"parallel     {plan.reason}",
    ]
    causes = [cause for cause in ranks[0].held if any(rank.held[cause] for rank in ranks)]
    rows = [[cause, *(format_bytes(rank.held[cause]) for rank in ranks)] for cause in causes]
    rows.append(["peak", *(format_bytes(rank.peak_bytes) for rank in ranks)])
    if plan.limit_bytes is not None:
        rows.append(["fits with a margin", *("yes" if plan.fits(rank) else "no" for rank in ranks)])
    ways = [rank.way for rank in ranks]
    parts = [_paragraph(head), columns(["each process holds at the peak", *ways], rows, left=(0,))]
    if cluster.processes > 1:
        parts.append(columns(["each process sends per step", *ways], list(_sent(plan, ranks)), left=(0,)))
        parts.append("Times and scaling are estimates from the links' nominal rates, not measured.")
    return "\n\n".join(parts)


def _sent(plan: ParallelPlan, ranks: Iterable[RankPlan]) -> Iterable[list[str]]:
    """Yield the rows of the table of communication: bytes, times and the expected scaling."""
    traffic = [rank.traffic for rank in ranks]
    yield ["blocks of the base", *(format_bytes(each.gathered_bytes) for each in traffic)]
    yield ["gradients", *(format_bytes(each.reduced_bytes) for each in traffic)]
    yield ["time, if nothing is hidden", *(format_seconds(each.seconds) for each in traffic)]
    if plan.step_seconds is None:
        label = f"{format_percent(GOOD_SCALING, 0)} scaling if a step computes for"
        yield [label, *(format_seconds(each.seconds_for(GOOD_SCALING)) for each in traffic)]
        return
    yield ["expected scaling", *(format_percent(plan.scaling(rank) or 0, 1) for rank in ranks)]
    rates = (format_rate(plan.tokens_per_second(rank) or 0, "tokens/s") for rank in ranks)
    yield ["expected speed of all", *rates]


def _trainable(plan: Plan) -> str:
    counted = plan.counted
    return f"{counted.trainable:,} of {counted.base:,} ({format_percent(counted.share)})"


def _head(plan: Plan) -> list[str]:
    shape, job = plan.shape, plan.job
    recomputed = {"none": "", "layers": ", gradient checkpointing"}.get(job.recompute, f", {job.recompute} recomputed")
    accelerated = "accelerated" if job.accelerated else "not accelerated"
    batches = "" if job.accumulation == 1 else f", {job.accumulation} batches per step"
    return [
        f"{shape.name} ({shape.architecture}, {format_count(shape.layers, 'layer')}, width {shape.hidden:,}, "
        f"vocabulary {shape.vocab:,}{', tied head' if shape.tied and shape.head is not None else ''})",
        f"{job.batch_rows} × {job.length_tokens:,} tokens per batch{batches}, {job.dtype}{recomputed}, {accelerated}",
    ]


def _summary(plan: Plan) -> list[str]:
    lora, full = plan.lora, plan.full
    time = "no estimate; pass --calibrate or --tokens-per-second" if lora.step_seconds is None else _times(plan)
    return [
        f"trainable    {_trainable(plan)}",
        *_active(plan),
        f"peak memory  {format_bytes(lora.memory.peak_bytes)} "
        f"(full fine-tuning {format_bytes(full.memory.peak_bytes)})",
        f"adapter      {format_bytes(lora.saved_bytes)} (full model {format_bytes(full.saved_bytes)})",
        f"checkpoint   {format_bytes(lora.resumable_bytes)} (full fine-tuning {format_bytes(full.resumable_bytes)})",
        f"time         {time}",
    ]


def _active(plan: Plan) -> list[str]:
    """Return a line with the parameters that process one token, or [] if all of them do."""
    shape = plan.shape
    if shape.active_parameters == shape.parameters:
        return []
    experts = shape.fused[0][0]
    return [
        f"active       {shape.active_parameters:,} of {shape.parameters:,} per token "
        f"({shape.passed(experts)} of {experts} experts)"
    ]


def _sites(plan: Plan) -> str:
    groups = plan.counted.groups()
    rows = [
        [g.label, g.kind, f"{g.out_features:,} × {g.in_features:,}", f"{g.sites:,}", f"{g.rank}", f"{g.scale:g}",
         f"{g.each:,}", f"{g.trainable:,}"]
        for g in groups
    ]  # fmt: skip
    for kind, counts in (("saved module", plan.counted.saved), ("token rows", plan.counted.rows)):
        rows += [[path, kind, "", "1", "", "", f"{count:,}", f"{count:,}"] for path, count in counts.items()]
    if plan.counted.biases:
        rows.append(["biases of the base", "", "", "", "", "", "", f"{plan.counted.biases:,}"])
    rows.append(["total", "", "", f"{len(plan.counted.sites):,}", "", "", "", f"{plan.counted.trainable:,}"])
    return columns(["site", "kind", "out × in", "sites", "r", "scale", "each", "trainable"], rows, left=(0, 1))


def _methods(plan: Plan) -> str:
    lora, full = plan.lora.memory, plan.full.memory
    of_full = {line.cause: line.at_peak_bytes for line in full.lines}
    rows = [
        [line.cause, format_bytes(line.at_peak_bytes), format_bytes(of_full.get(line.cause, 0))] for line in lora.lines
    ]
    rows.append(["peak", format_bytes(lora.peak_bytes), format_bytes(full.peak_bytes)])
    return columns(["memory at the peak", "LoRA", "full fine-tuning"], rows)


def _why(plan: Plan) -> str:
    lines = [f"shape from: {plan.shape.source}", *plan.reasons]
    return "counts:\n" + _paragraph([f"  {line}" for line in lines])


def _memory(plan: Plan) -> str:
    needs = plan.lora.memory
    rows = [[line.cause, format_bytes(line.size_bytes), line.formula] for line in needs.lines]
    rows.append(["peak", format_bytes(needs.peak_bytes), f"when {needs.peak_moment}"])
    return columns(["memory", "largest", "bytes ="], rows, left=(0, 2), width=WIDTH)


def _files(plan: Plan) -> str:
    rows = [[file.what, format_bytes(file.size_bytes), file.formula] for file in plan.files]
    return columns(["on disk", "size", "bytes ="], rows, left=(0, 2), width=WIDTH)


def _flops(plan: Plan) -> str:
    lora, full = plan.lora, plan.full
    parts = ("forward", "backward", *(("recomputed",) if lora.flops.recomputed else ()), "total")
    rows = [
        [part, *(format_quantity(getattr(method.flops, part), "FLOP") for method in (lora, full))] for part in parts
    ]
    if lora.tokens_per_second is not None and full.tokens_per_second is not None:
        rates = (format_rate(method.tokens_per_second or 0, "tokens/s") for method in (lora, full))
        rows.append(["speed", *rates])
        rows.append(["one step", *(format_seconds(method.step_seconds or 0) for method in (lora, full))])
    if lora.run_seconds is not None and full.run_seconds is not None:
        times = (format_seconds(method.run_seconds or 0) for method in (lora, full))
        rows.append([format_count(plan.job.steps or 0, "step"), *times])
    source = "" if plan.speed is None else f"\nspeed: {plan.speed.source}"
    return columns(["per token", "LoRA", "full fine-tuning"], rows) + source


def _ranks(ranks: RankTable) -> str:
    rows = [
        [", ".join(row.labels), f"{row.out_features:,} × {row.in_features:,}", f"{row.sites:,}",
         *(f"{each:,}" for each in row.each)]
        for row in ranks.rows
    ]  # fmt: skip
    rows.append(["all sites", "", f"{sum(row.sites for row in ranks.rows):,}", *map("{:,}".format, ranks.totals)])
    rows.append(["of the base", "", "", *(format_percent(share) for share in ranks.shares)])
    return columns(["one site, by rank", "out × in", "sites", *(f"r={rank}" for rank in ranks.ranks)], rows)


def _times(plan: Plan) -> str:
    method = plan.lora
    step = f"{format_seconds(method.step_seconds or 0)} per step"
    speed = format_rate(method.tokens_per_second or 0, "tokens/s")
    if method.run_seconds is None:
        return f"{step} ({speed})"
    run = f"{format_seconds(method.run_seconds)} for {format_count(plan.job.steps or 0, 'step')}"
    if plan.job.evaluations:
        run += f" and {format_count(plan.job.evaluations, 'evaluation')}"
    elif plan.job.evaluations is None:
        run += ", without evaluations"
    return f"{run} ({speed}, {step})"


def _paragraph(lines: Iterable[str]) -> str:
    return wrap("\n".join(lines), WIDTH)
