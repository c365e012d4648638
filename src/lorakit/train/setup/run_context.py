"""The context of a run once its weights are loaded: `Run`, with its limits, its plan and the disk space it needs.

`run_plan.py` computes `RunPlan` and `DiskSpace`, and `prepare.py` the rest of `Run`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import plan
from lorakit.data import BatchLoader
from lorakit.plan.budget import needed_bytes
from lorakit.speed import Acceleration
from lorakit.train.files import run_folder
from lorakit.train.files.trackers import Trackers
from lorakit.train.files.train_state import TrainState
from lorakit.train.loop.optimizer import Named
from lorakit.train.loop.progress import Progress
from lorakit.train.loop.schedule import Schedule
from lorakit.train.loop.step import StepOptions
from lorakit.train.processes.processes import Processes
from lorakit.train.processes.restarting import LAUNCH, launch_record
from lorakit.train.processes.sharding import ShardedBase
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import run_data
from lorakit.train.setup.run_int8 import RunInt8
from lorakit.train.setup.run_spec import RunSpec

_EVALUATIONS = 10

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name of a 16-bit dtype -> the dtype."""

ROOMY = 0.5
"""Fraction of the limit of `--fit` below which freed memory may be kept: gaps add up to 36% (docs/memory.md)."""


def seed_of(seed: int, rank: int, step: int = 0) -> int:
    """Return the seed of the random number generators of one process; that of process 0 is the run's at the start.

    Args:
        seed: The run's seed.
        rank: Number of the process.
        step: Step from which the run is resumed with another number of processes, or 0.
    """
    return (seed + rank + (step << 32)) % 2**63


@dataclass(frozen=True)
class RunLimits:
    """The length of a run and the intervals between evaluations and between checkpoints.

    Attributes:
        total_steps: Number of optimizer steps in the run.
        accumulation: Number of batches per step in all processes together; the last step of an epoch may have fewer.
        eval_steps: Number of steps between evaluations.
        save_steps: Number of steps between checkpoints.
        patience: Number of consecutive evaluations without improvement after which the run stops, or None.
    """

    total_steps: int
    accumulation: int
    eval_steps: int
    save_steps: int
    patience: int | None

    @classmethod
    def of(cls, settings: TrainSettings, loader: BatchLoader, processes: int = 1) -> RunLimits:
        """Compute the limits; by default, the adapter is evaluated and saved after every 10% of the steps.

        Args:
            settings: The run's settings.
            loader: The loader of the training data.
            processes: Number of processes with which the run was started.
        """
        accumulation = settings.gradient_accumulation_steps * processes
        epoch = math.ceil(loader.batches_per_epoch / accumulation)  # the last step takes the remaining batches
        total = settings.max_steps or max(1, math.ceil(settings.num_train_epochs * epoch))
        eval_steps = settings.eval_steps or max(1, math.ceil(total / _EVALUATIONS))
        return cls(total, accumulation, eval_steps, settings.save_steps or eval_steps, settings.early_stopping_patience)

    def with_accumulation(self, accumulation: int) -> RunLimits:
        """Return the same limits with another number of batches per step."""
        return dataclasses.replace(self, accumulation=accumulation)


@dataclass(frozen=True)
class RunPlan:
    """Precision, batch size, recomputation and estimated cost of a run.

    Attributes:
        dtype: Precision of the base: "bfloat16", "float16" or "float32".
        recompute: What the backward pass recomputes: a value in `lorakit.plan.job.RECOMPUTED`.
        batch_rows: Number of rows per batch.
        accumulation: Number of batches per step.
        estimated: The plan.
        values: The plan as plain JSON values.
        proposed: Plans that should fit into the limit of `--fit`, fastest first; empty if nothing is left to choose.
        is_tight: Whether the planned peak is so close to the limit of `--fit` that freed memory must not be kept.
        dtype_reason: Message that says why this precision was chosen.
    """

    dtype: str
    recompute: str
    batch_rows: int
    accumulation: int
    estimated: plan.Plan
    values: Mapping[str, Any]
    proposed: tuple[plan.Plan, ...] = ()
    is_tight: bool = False
    dtype_reason: str = ""

    @classmethod
    def of(
        cls,
        estimated: plan.Plan,
        limit: str | None = None,
        proposed: Sequence[plan.Plan] = (),
        dtype_reason: str = "",
    ) -> RunPlan:
        """Return the part of a plan that a run needs.

        Args:
            estimated: The plan.
            limit: The setting `fit`.
            proposed: Plans from which one is chosen after a measurement.
            dtype_reason: Message that says why the precision was chosen.
        """
        job = estimated.job
        is_tight = limit is not None and needed_bytes(estimated) > ROOMY * plan.bytes_of(limit)
        sizes = job.dtype, job.recompute, job.batch_rows, job.accumulation
        return cls(*sizes, estimated, estimated.as_dict(), tuple(proposed), is_tight, dtype_reason)

    def step_options(self, spec: RunSpec, acceleration: Acceleration | None) -> StepOptions:
        """Return the options for `train_step`.

        Args:
            spec: The run's specification.
            acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        """
        settings, device = spec.settings, spec.device
        return StepOptions(
            device=device,
            max_grad_norm=settings.max_grad_norm,
            autocast=NARROW.get(self.dtype) if device.type != "cpu" else None,
            acceleration=acceleration,
            recompute=self.recompute,
            releases_memory=device.type == "cpu" and self.is_tight,
            limited_by=next((name for name in ("memory_budget", "fit") if getattr(settings, name) is not None), None),
            loss=spec.task.objective.loss_sum,
            processes=spec.processes,
        )


@dataclass(frozen=True)
class DiskSpace:
    """Disk space that a run needs, in bytes.

    Attributes:
        checkpoint: Size of one checkpoint.
        least: Size of the result alone: the published adapter with its tokenizer, `metrics.jsonl` and `run.json`.
        whole: Peak total size of all files during the run.
    """

    checkpoint: int
    least: int
    whole: int


@dataclass(frozen=True)
class LoadedModel:
    """The model of a run with its adapter, and how it computes.

    Attributes:
        model: The adapted model.
        base_bytes: Size of the base's weights in memory.
        choices: Autotuned choices to pass to `lorakit.ops.choices.activate`.
        acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        int8: The int8 base, or None if the base is multiplied in its dtype.
        sharded: The base if it is sharded over processes, or None.
    """

    model: nn.Module
    base_bytes: int
    choices: Mapping[str, int]
    acceleration: Acceleration | None = None
    int8: RunInt8 | None = None
    sharded: ShardedBase | None = None


@dataclass(frozen=True)
class Updates:
    """The trainable tensors, and how an optimizer step changes them.

    Attributes:
        named: (name, tensor) pairs for the model's trainable tensors (any shape).
        optimizer: The optimizer for the trainable tensors.
        schedule: Learning rate schedule.
        scaler: Scaler of the loss if the base is in fp16, or None; its state is part of every checkpoint.
    """

    named: Named
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler | None = None


@dataclass(frozen=True)
class Start:
    """When and from where a run starts or continues, and the disk space that it needs from there.

    Attributes:
        started: Value of `time.perf_counter()` when `run` was called.
        space: Disk space that the run needs.
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
    """The context of a run once the weights are loaded.

    Attributes:
        spec: Everything that is known before weights are loaded.
        plan: Precision, recomputation and estimated cost.
        batches: Training and evaluation data.
        limits: Length of the run, and evaluation and checkpoint intervals.
        loaded: The adapted model.
        updates: The trainable tensors and their optimizer.
        start: Where the run starts.
        state: Training state, which the loop updates.
        progress: Receiver of progress reports and messages.
        trackers: The trackers that receive the metrics; none is open before the run starts.
        notes: Messages that were printed, for the result.
        status: "running", "failed", "interrupted", "stopped early" or "finished".
    """

    spec: RunSpec
    plan: RunPlan
    batches: run_data.RunBatches
    limits: RunLimits
    loaded: LoadedModel
    updates: Updates
    start: Start
    state: TrainState
    progress: Progress
    trackers: Trackers
    notes: tuple[str, ...] = ()
    status: str = "running"

    @property
    def processes(self) -> Processes:
        """The processes of the run; those that share a base run the model equally often."""
        return dataclasses.replace(self.spec.processes, in_lockstep=self.loaded.sharded is not None)

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
        options = self.plan.step_options(self.spec, self.loaded.acceleration)
        return dataclasses.replace(options, scaler=self.updates.scaler, processes=self.processes)

    @property
    def seeds(self) -> list[int]:
        """Seed of the random number generators of each process, which draw dropout, at the step `seeded_at`."""
        return [
            seed_of(self.spec.settings.seed, rank, self.start.seeded_at) for rank in range(self.spec.processes.count)
        ]

    def record(self) -> dict[str, Any]:
        """Return the contents of `run.json`, except for the result, as plain JSON values."""
        spec, held_out = self.spec, self.batches.held_out_report
        return {
            "status": self.status,
            "settings": spec.settings.as_dict(),
            "resolved": {
                "base": spec.source.base_name,
                **spec.task.as_dict(),
                "dtype": self.plan.dtype,
                "dtype_reason": self.plan.dtype_reason,
                "quantization": spec.quantization_values,
                "base_matmul": spec.base_matmul,
                "device": str(spec.device),
                "max_length": spec.forecast.max_length,
                "split": spec.data.rule or None,
                "batch_rows": self.plan.batch_rows,
                "recompute": self.plan.recompute,
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
            "plan": dict(self.plan.values),
            "trackers": dict(self.trackers.ids),
            "processes": {"count": spec.processes.count, "seeds": self.seeds, "seeded_at": self.start.seeded_at},
            LAUNCH: launch_record(spec.processes),
            "int8": None if self.loaded.int8 is None else dict(self.loaded.int8.record),
            "sharding": None if self.loaded.sharded is None else self.loaded.sharded.as_dict(),
        }
