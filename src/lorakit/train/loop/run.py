"""A run once its weights are loaded: the model, how its tensors are updated, where it starts, and its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import core, durable
from lorakit.data import Batch, BatchLoader, Report
from lorakit.data import Sequence as Tokens
from lorakit.report import INT8_FILE
from lorakit.speed import Acceleration
from lorakit.tables import format_bytes, format_count
from lorakit.tasks import TaskOnData, evaluation_batches
from lorakit.train.files import run_folder
from lorakit.train.files.trackers import Trackers
from lorakit.train.files.train_state import TrainState
from lorakit.train.loop.optimizer import Named
from lorakit.train.loop.step import StepOptions
from lorakit.train.processes.processes import Processes
from lorakit.train.processes.sharding import ShardedBase
from lorakit.train.spec import DiskSpace, RunLimits, RunPlan, RunSpec, Schedule

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name of a 16-bit dtype -> the dtype."""

LAUNCH = "launch"
"""Key of `run.json` for the launcher's job and the number of restarts; None if it does not restart processes."""

INT8_NAME = "int8 (W8A8)"
"""Name of int8 matmuls in reports."""


def step_options(spec: RunSpec, plan: RunPlan, acceleration: Acceleration | None) -> StepOptions:
    """Return the options of a run's steps, without a loss scaler."""
    settings, device = spec.settings, spec.device
    return StepOptions(
        device=device,
        max_grad_norm=settings.max_grad_norm,
        autocast=NARROW.get(plan.job.dtype) if device.type != "cpu" else None,
        acceleration=acceleration,
        recompute=plan.job.recompute,
        releases_memory=device.type == "cpu" and plan.is_tight,
        limited_by=next((name for name in ("memory_budget", "fit") if getattr(settings, name) is not None), None),
        loss=spec.task.objective.loss_sum,
        processes=spec.processes,
    )


@dataclass(frozen=True)
class RunBatches:
    """The data of a run, split into batches, and its row and token counts; None without evaluation data."""

    loader: BatchLoader
    held_out_sequences: Sequence[Tokens] | None
    train_report: Report
    held_out_report: Report | None
    task: TaskOnData

    @property
    def held_out(self) -> Callable[[], Iterable[Batch]] | None:
        """Function that returns the evaluation batches, or None if there is no evaluation data."""
        if self.held_out_sequences is None:
            return None
        loader, collate = self.loader, self.task.objective.collate
        rows, pad = loader.batch_rows, loader.pad_id
        return partial(evaluation_batches, self.task.task, collate, self.held_out_sequences, rows, pad)

    @property
    def parts(self) -> list[Sequence[Tokens]]:
        """The training data and, if there is any, the evaluation data."""
        return (
            [self.loader.sequences]
            if self.held_out_sequences is None
            else [self.loader.sequences, self.held_out_sequences]
        )

    def next_share(self, accumulation: int, processes: Processes) -> list[Batch]:
        """Return this process's batches of the next step; a step never mixes rows from two epochs.

        Every process advances its loader over all batches of the step, `accumulation` in all processes together, so the
        order of the data does not depend on the number of processes. There are no batches if there are too few rows.

        Raises:
            DataError: A row of streamed data does not fit.
        """
        groups = list[list[Tokens]]()
        while len(groups) < accumulation:
            groups.append(self.loader.next_rows())
            if self.loader.epoch.is_integer():  # that was the last batch of the epoch
                break
        mine = share_of(groups, processes.rank, processes.count, self.task.task.needs_batch)
        return [self.loader.batch_of(rows) for rows in mine]

    def with_rows(self, batch_rows: int) -> RunBatches:
        """Return the same data, in the same order, in batches of another size, from the beginning."""
        if batch_rows == self.loader.batch_rows:
            return self
        return replace(self, loader=replace(self.loader, batch_rows=batch_rows))


def share_of(groups: Sequence[list[Tokens]], rank: int, processes: int, is_whole: bool = False) -> list[list[Tokens]]:
    """Return the part of a step's batches that one process computes; the parts together contain each row once.

    Rows are given out in order of length, longest first, each to the process that has the fewest tokens so far. No
    process gets more batches than it would if whole batches were given out, and no batch has more rows than before. A
    process gets none if there are fewer rows than processes.

    Args:
        groups: The rows of each batch of the step, as one process would compute them; at least one.
        rank: Number of the process, from 0.
        processes: Number of processes.
        is_whole: Whether batches must stay whole, because the loss compares the rows of a batch.
    """
    if processes == 1:
        return list(groups)
    if is_whole:
        sizes = [sum(map(len, group)) for group in groups]
        return [groups[index] for index in _shares(sizes, processes, -(-len(groups) // processes))[rank]]
    batch_rows = max(map(len, groups))
    rows = [row for group in groups for row in group]
    most = -(-len(groups) // processes) * batch_rows
    mine = [rows[index] for index in _shares(list(map(len, rows)), processes, most)[rank]]
    return [mine[at : at + batch_rows] for at in range(0, len(mine), batch_rows)]


def _shares(sizes: Sequence[int], processes: int, most: int) -> list[list[int]]:
    """Divide items by size among processes, at most `most` each; return the items of each, in ascending order."""
    shares, totals = [list[int]() for _ in range(processes)], [0] * processes
    for index in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        free = (rank for rank in range(processes) if len(shares[rank]) < most)
        least = min(free, key=lambda rank: (totals[rank], rank))
        shares[least].append(index)
        totals[least] += sizes[index]
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class RunInt8:
    """The int8 base of a run.

    Attributes:
        record: JSON values for `run.json` and `lorakit.json`, which docs/format.md describes.
        scales: Contents of the file with the input scales.
        originals: Path -> original module, if they are kept.
    """

    record: Mapping[str, Any]
    scales: bytes = field(repr=False)
    originals: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def bytes_after(self) -> int:
        """Size of the base's weights in memory, in bytes."""
        return int(self.record["bytes_after"]) + sum(
            tensor.numel() * tensor.element_size()
            for module in self.originals.values()
            for name, tensor in module.named_parameters()
            if name != "bias"  # the int8 layer holds it too
        )

    def lines(self) -> list[str]:
        """Return a report in two lines: what is multiplied in int8, and the losses on the calibration rows."""
        values = self.record
        loss, in_int8 = values["loss"], values["int8_loss"]
        return [
            f"Base matmuls: {INT8_NAME} in {format_count(values['layers'], 'layer')}, calibrated on "
            f"{format_count(values['rows'], 'row')} ({values['tokens']:,} tokens); base "
            f"{format_bytes(values['bytes_before'])} → {format_bytes(values['bytes_after'])}.",
            f"Loss on the calibration rows: {loss:.4f} → {in_int8:.4f} in int8 ({in_int8 - loss:+.4f} ± "
            f"{values['loss_error']:.4f}; bound {values['loss_bound']:g}).",
        ]

    def write(self, folder: Path) -> None:
        """Write the input scales to the run directory."""
        durable.write_bytes(folder / INT8_FILE, self.scales)

    def restore(self, model: nn.Module) -> None:
        """Put the original modules back, to evaluate the adapter on them."""
        paths, values, originals = tuple(self.originals), self.record, dict(self.originals)
        sizes = values["bytes_before"], values["bytes_after"]
        core.Int8Base(model, paths, {}, values["kept"], values["smoothing"], 0, (), {}, *sizes, originals).restore()


@dataclass(frozen=True)
class LoadedModel:
    """The model of a run with its adapter, and how it computes.

    `base_bytes` is the size of the base's weights in memory; `choices` are for `lorakit.ops.choices.activate`.
    """

    model: nn.Module
    base_bytes: int
    choices: Mapping[str, int]
    acceleration: Acceleration | None = None
    int8: RunInt8 | None = None
    sharded: ShardedBase | None = None


@dataclass(frozen=True)
class Updates:
    """The trainable tensors (any shape) by name, and how an optimizer step changes them; the scaler is for fp16."""

    named: Named
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler | None = None


@dataclass(frozen=True)
class Start:
    """When and from where a run starts or continues, and the disk space that it needs from there.

    Attributes:
        started: Value of `time.perf_counter()` when `run` was called.
        resumed_from: The checkpoint from which the run was resumed, or None.
        damaged: Damaged checkpoints newer than `resumed_from`.
        seeded_at: Step at which the random number generators were seeded: 0, or that from which the run was resumed
            with another number of processes.
    """

    started: float
    space: DiskSpace
    resumed_from: Path | None = None
    damaged: tuple[Path, ...] = ()
    seeded_at: int = 0


@dataclass
class Run:
    """A run once the weights are loaded; the loop updates `state` and `status`.

    Attributes:
        trackers: The trackers that receive the metrics; none is open before the run starts.
        notes: Messages that were printed, for the result.
        status: "running", "failed", "interrupted", "stopped early" or "finished".
    """

    spec: RunSpec
    plan: RunPlan
    batches: RunBatches
    limits: RunLimits
    loaded: LoadedModel
    updates: Updates
    start: Start
    state: TrainState
    trackers: Trackers
    notes: tuple[str, ...] = ()
    status: str = "running"

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for _, parameter in self.updates.named)

    @property
    def total_parameters(self) -> int:
        """Number of parameters in the base."""
        return self.spec.forecast.shape.parameters

    @property
    def step_options(self) -> StepOptions:
        """Options for `train_step`."""
        options = step_options(self.spec, self.plan, self.loaded.acceleration)
        return dataclasses.replace(options, scaler=self.updates.scaler)

    @property
    def seeds(self) -> list[int]:
        """Seed of the random number generators of each process, which draw dropout, at the step `seeded_at`."""
        return [self.spec.seed_of(rank, self.start.seeded_at) for rank in range(self.spec.processes.count)]

    def record(self) -> dict[str, Any]:
        """Return the contents of `run.json`, except for the result, as plain JSON values."""
        spec, held_out = self.spec, self.batches.held_out_report
        job, restarts = spec.processes.job, spec.processes.restarts
        return {
            "status": self.status,
            "settings": spec.settings.as_dict(),
            "resolved": {
                "base": spec.source.base_name,
                **spec.task.as_dict(),
                "dtype": self.plan.job.dtype,
                "dtype_reason": self.plan.dtype_reason,
                "quantization": spec.quantization_values,
                "base_matmul": spec.base_matmul,
                "device": str(spec.device),
                "max_length": spec.forecast.max_length,
                "split": spec.data.rule or None,
                "batch_rows": self.plan.job.batch_rows,
                "recompute": self.plan.job.recompute,
                **dataclasses.asdict(self.limits),
                "processes": spec.initial_processes,
                "trainable_parameters": self.trainable_parameters,
                "total_parameters": self.total_parameters,
            },
            "from_adapter": None if spec.start is None else spec.start.origin,
            "versions": run_folder.versions(),
            "data_sha256": dict(spec.hashes),
            "data": self.batches.train_report.as_dict(),
            "evaluation_data": held_out.as_dict() if held_out else None,
            "plan": self.plan.estimated.as_dict(),
            "trackers": dict(self.trackers.ids),
            "processes": {"count": spec.processes.count, "seeds": self.seeds, "seeded_at": self.start.seeded_at},
            LAUNCH: {"job": job, "restarts": restarts} if job else None,
            "int8": None if self.loaded.int8 is None else dict(self.loaded.int8.record),
            "sharding": None if self.loaded.sharded is None else self.loaded.sharded.as_dict(),
        }
