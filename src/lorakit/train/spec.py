"""What is known of a run before weights are loaded: its specification, length, learning rates, plan, disk space.

`lorakit.train.setup` makes these values, and `lorakit.train.loop` uses them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorakit import core, hub, plan
from lorakit.config import LoraConfig
from lorakit.data import BatchLoader, Split
from lorakit.durable import JsonObject
from lorakit.errors import UsageError
from lorakit.plan.budget import needed_bytes
from lorakit.plan.quantized import Quantization
from lorakit.session.tokenizers import SavedTokenizer
from lorakit.tasks import TaskOnData, task_of_adapter
from lorakit.train.processes.processes import ALONE, Processes
from lorakit.train.progress import Progress
from lorakit.train.settings.defaults import DECAY_RATIO, WARMUP_RATIO
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.settings.types import Scheduler

ADAPTER = "default"
"""Name under which the run's adapter is attached to the model."""

ROOMY = 0.5
"""Fraction of the limit of `--fit` below which freed memory may be kept: gaps add up to 36% (docs/memory.md)."""

_EVALUATIONS = 10


@dataclass(frozen=True)
class StartAdapter:
    """The adapter that a run starts from.

    Attributes:
        adapter: The adapter: the given one or, if the run is resumed, the one in the newest checkpoint.
        origin: Origin of the given adapter, as plain JSON values: `name` (as given), `sha256` (of its weights file),
            `base_name`, `steps` (number of optimizer steps that trained it), and `rows` (`shape` and `columns` of its
            training data); unknown values are None.
        optimizer: Checkpoint with the optimizer state to continue with, or None.
    """

    adapter: core.TrainedAdapter
    origin: JsonObject
    optimizer: Path | None = None

    @property
    def task(self) -> TaskOnData:
        """The task that the adapter was trained for; raises UsageError if lorakit has none for its `task_type`."""
        return task_of_adapter(self.adapter.config, self.adapter.facts.get("training"), self.adapter.head_outputs)


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a run adds to the tokenizer and the base.

    Attributes:
        added: Ids of the new tokens, and how the tokenizer encoded their text before they were added.
        vocabulary: Number of rows that the base's embedding needs.
        rows: Embedding rows to train: of the new tokens, and of existing tokens that have no row in the base.
    """

    added: hub.AddedTokens
    vocabulary: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Forecast:
    """Properties of a run that are known from the settings and the model config, before the data is tokenized.

    The maximum sequence length is the setting, or chosen by the data, the model's limit and the memory; `notes` are
    messages to print.
    """

    shape: plan.ModelShape
    config: LoraConfig
    max_length: int
    notes: tuple[str, ...]
    new_tokens: NewTokens | None = None


@dataclass(frozen=True)
class RunSpec:
    """The specification of a run: everything that is known before weights are loaded.

    Attributes:
        settings: All settings, including those taken from the run being resumed.
        folder: The run directory, which exists and is writable.
        lock: File descriptor that holds the lock on the run directory; -1 if locks are not supported.
        hashes: Dict from the path of each data file to the file's SHA-256, or to its identity if it is streamed.
        record: Contents of `run.json` if the run is resumed, or None.
        tokenizer: The tokenizer of the base or the start adapter, with the run's new tokens.
        tokenizer_sha256: SHA-256 of the tokenizer, computed once, because that takes a third of a second.
        quantization: Quantization of the base, from the settings or the base's files, or None.
        start: The adapter that the run starts from, or None.
        has_own_tokenizer: Whether the tokenizer or its chat template differs from the base's.
        base_matmul: How the base is multiplied: "dtype" or "int8", as the settings and the machine allow.
        processes: The processes of the run; only the first one locks the directory.
    """

    settings: TrainSettings
    folder: Path
    lock: int
    device: torch.device
    source: hub.ModelSource
    data: Split
    hashes: Mapping[str, str]
    record: Mapping[str, Any] | None
    tokenizer: SavedTokenizer
    tokenizer_sha256: str
    task: TaskOnData
    forecast: Forecast
    quantization: Quantization | None = None
    start: StartAdapter | None = None
    has_own_tokenizer: bool = False
    base_matmul: str = "dtype"
    processes: Processes = ALONE
    progress: Progress = field(default_factory=Progress)

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The values that the settings resolved to when the resumed run was started; empty if it is not resumed."""
        return (self.record or {}).get("resolved") or {}

    @property
    def initial_processes(self) -> int:
        """Number of processes with which the run was started, which determines the number of rows per step."""
        return int(self.resolved.get("processes") or 1) if self.resolved else self.processes.count

    @property
    def before_training(self) -> str:
        """Name of the model that is evaluated before the first step, for messages."""
        if self.start is not None:
            return "the adapter before training"
        return "the base" if self.task.task.loader not in hub.WITH_NEW_HEADS else "before training"

    @property
    def quantization_values(self) -> dict[str, Any] | None:
        """The base's quantization as a dict of plain JSON values, or None."""
        return None if self.quantization is None else hub.quantization_metadata(self.quantization)

    def seed_of(self, rank: int, step: int = 0) -> int:
        """Return the seed of the random number generators of process `rank`; that of process 0 is the run's.

        If the run is resumed with another number of processes, `step` is the step from which it is resumed.
        """
        return (self.settings.seed + rank + (step << 32)) % 2**63


@dataclass(frozen=True)
class RunLimits:
    """The length of a run and the intervals between evaluations and between checkpoints, in optimizer steps.

    Attributes:
        accumulation: Number of batches per step in all processes together; the last step of an epoch may have fewer.
        patience: Number of consecutive evaluations without improvement after which the run stops, or None.
    """

    total_steps: int
    accumulation: int
    eval_steps: int
    save_steps: int
    patience: int | None

    @classmethod
    def of(cls, settings: TrainSettings, loader: BatchLoader, processes: int = 1) -> RunLimits:
        """Compute the limits of a run that was started with several processes.

        By default, the adapter is evaluated and saved after every 10% of the steps.
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
class Schedule:
    """Stateless learning rate schedule: a warm-up, then a decay or a constant rate.   [docs/math.md (44)]

    Attributes:
        peak: Learning rate at the end of the warm-up.
        total_steps: Number of optimizer steps in the run.
        warmup_steps: Number of steps over which the rate rises linearly; the first step already has a rate above 0.
        kind: Shape after the warm-up: "cosine" or "linear" decay toward zero at `total_steps`; "constant"; or "wsd",
            a constant rate that decays toward zero over the last `decay_steps`.
        decay_steps: Number of steps over which "wsd" decays, at least 1; other kinds ignore it.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    kind: Scheduler
    decay_steps: int = 1

    def rate(self, step: int) -> float:
        """Return the learning rate for a step, from 0: at most `peak`, and above 0 for every step of the run.

        Source:
            "wsd": Hu et al. 2024, arXiv:2404.06395; its decay, 1 − √x: Hägele et al. 2024, arXiv:2405.18392,
            section 3.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        # the first step of a decay has the peak rate; a step after the last one would have a rate of zero
        first = max(self.warmup_steps, self.total_steps - self.decay_steps) if self.kind == "wsd" else self.warmup_steps
        done = min(1.0, max(0.0, (step - first) / max(1, self.total_steps - first)))
        if self.kind == "wsd":
            return self.peak * (1 - math.sqrt(done))
        return self.peak * (1 - done if self.kind == "linear" else (1 - math.cos(math.pi * (1 - done))) / 2)


def schedule(settings: TrainSettings, total_steps: int) -> Schedule:
    """Return the schedule of a run with at least one step; fractions of steps are rounded up.

    Raises:
        UsageError: The warm-up is longer than the run, so the rate would never reach its peak.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        ratio = WARMUP_RATIO if settings.warmup_ratio is None else settings.warmup_ratio
        warmup = math.ceil(ratio * total_steps)
    if warmup > total_steps:
        text = (
            f"warmup_steps is {warmup}, but the run has only {total_steps} steps; pass a smaller --warmup-steps, or "
            "use --warmup-ratio."
        )
        raise UsageError(text, what=warmup, field="warmup_steps")
    ratio = DECAY_RATIO if settings.decay_ratio is None else settings.decay_ratio
    decay = max(1, math.ceil(ratio * total_steps))
    return Schedule(settings.learning_rate, total_steps, warmup, settings.lr_scheduler_type, decay)


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run: precision, batch size, recomputation and estimated cost.

    Attributes:
        limit: The setting `fit`.
        proposed: Plans that should fit into the limit, fastest first; empty if nothing is left to choose.
        dtype_reason: Why the base has the precision of the plan.
    """

    estimated: plan.Plan
    limit: str | None = None
    proposed: Sequence[plan.Plan] = ()
    dtype_reason: str = ""

    @property
    def job(self) -> plan.Job:
        """The planned job, with the choices of the plan."""
        return self.estimated.job

    @property
    def is_tight(self) -> bool:
        """Whether the planned peak is so close to the limit of `--fit` that freed memory must not be kept."""
        return self.limit is not None and needed_bytes(self.estimated) > ROOMY * plan.bytes_of(self.limit)


@dataclass(frozen=True)
class DiskSpace:
    """Disk space that a run needs, in bytes: for a checkpoint, for the result alone, and the peak of all files.

    The result is the published adapter with its tokenizer, `metrics.jsonl` and `run.json`.
    """

    checkpoint: int
    least: int
    whole: int
