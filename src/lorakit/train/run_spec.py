"""The context of a run: `RunSpec` is created before any weights are loaded, and `Run` is created afterwards.

`RunSpec.of` raises every error that can be detected without weights. `run_plan.py` computes `RunPlan` and
`DiskSpace`, and `trainer.prepare` computes the rest of `Run`.
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

from lorakit import hub, plan
from lorakit.data import Loader, Split, read_template
from lorakit.errors import AdapterFileError, ModelError, RunError, TargetError, UsageError
from lorakit.plan.fitting import needed_bytes
from lorakit.plan.quantized import Quantization
from lorakit.speed import Acceleration
from lorakit.tasks import TaskOnData
from lorakit.train import checkpoint, run_data, run_folder
from lorakit.train.checkpoint import TrainState
from lorakit.train.evaluation import own_tokenizer
from lorakit.train.forecast import Forecast, SavedTokenizer, check_single_process, chosen_task, pick_device
from lorakit.train.forecast import forecast as build_forecast
from lorakit.train.optimizer import Named, check_optimizer
from lorakit.train.progress import Progress
from lorakit.train.schedule import Schedule
from lorakit.train.settings import TrainSettings
from lorakit.train.settings_sources import complete
from lorakit.train.start_adapter import StartAdapter, start_adapter
from lorakit.train.step import StepOptions
from lorakit.train.trackers import Trackers, check_trackers

ADAPTER = "default"
"""Name under which the run's adapter is attached to the model."""

_EVALUATIONS = 10

ROOMY = 0.5
"""Fraction of the limit of `--fit` below which freed memory may be kept: gaps add up to 36% (docs/memory.md)."""


@dataclass(frozen=True)
class RunSpec:
    """The specification of a run: everything that is known before weights are loaded.

    Attributes:
        settings: All settings, including those taken from the run being resumed.
        folder: The run directory, which exists and is writable.
        lock: File descriptor that holds the lock on the run directory; -1 if locks are not supported.
        device: The run's device.
        source: The base model.
        data: Records for training and evaluation.
        hashes: Dict from the path of each data file to the file's SHA-256, or to its identity if it is streamed.
        record: Contents of `run.json` if the run is resumed, or None.
        tokenizer: The tokenizer of the base or the start adapter, with the run's new tokens.
        task: The task, and what it predicts for this data.
        forecast: The base's shape, the adapter config, and the maximum sequence length.
        quantization: Quantization of the base, from the settings or the base's files, or None.
        start: The adapter that the run starts from, or None.
        has_own_tokenizer: Whether the tokenizer differs from the base's and is saved in every checkpoint.
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
    task: TaskOnData
    forecast: Forecast
    quantization: Quantization | None = None
    start: StartAdapter | None = None
    has_own_tokenizer: bool = False

    @classmethod
    def of(cls, settings: TrainSettings, progress: Progress) -> RunSpec:
        """Check the settings, machine, data, model and run directory, and finally lock the directory.

        Args:
            settings: The given settings; missing ones are taken from the run being resumed.
            progress: Receives messages about slow operations.

        Returns:
            The specification; nothing has been written yet, except that the run directory may have been created.

        Raises:
            UsageError: The settings are incompatible with the data, this machine or the run directory.
            LorakitError: The data, the model or the run directory cannot be used; the error class and message say why.
        """
        check_single_process()
        settings = given = complete(settings)
        settings.lora_config()
        quantization = settings.stored_as()
        if quantization is not None:
            hub.require_quantizer(quantization)
        device = pick_device(settings.device)
        check_optimizer(settings.optimizer, device)
        check_trackers(settings.report_to)
        run_folder.check_output_dir(settings)
        folder = Path(settings.output_dir)
        record = run_folder.read_record(folder) if settings.resume else None
        start = start_adapter(settings, record)
        if start is not None and record is None:
            settings = start.completed(settings)
        data = run_data.read_data(settings, record, progress.say)
        if settings.early_stopping_patience is not None and not data.held_out:
            raise UsageError(
                f"early_stopping_patience requires evaluation data. {data.note}", field="early_stopping_patience"
            )
        hashes = data.digests()
        if record is not None:
            _check_same_data(folder, record, hashes)
            _check_steps_left(folder, settings.max_steps)
        source = _source(settings, given, progress)
        hub.require(source, tokenizer=True)
        quantization = hub.stored_as_files(source, quantization)
        tokenizer, is_own = _tokenizer(settings, source, start)
        task = chosen_task(settings, data, source, None if start is None else start.task, progress.say)
        found = _forecast(settings, source, tokenizer, task, start)
        if start is not None and record is None:
            start.check_targets(given, found.shape)
        lock = run_folder.lock_output_dir(folder)
        is_own = is_own or found.new_tokens is not None
        return cls(
            settings=settings,
            folder=folder,
            lock=lock,
            device=device,
            source=source,
            data=data,
            hashes=hashes,
            record=record,
            tokenizer=tokenizer,
            task=task,
            forecast=found,
            quantization=quantization,
            start=start,
            has_own_tokenizer=is_own,
        )

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

    def step_options(self, plan: RunPlan, acceleration: Acceleration | None) -> StepOptions:
        """Return the options for `train_step`.

        Args:
            plan: The run's plan.
            acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        """
        settings, device = self.settings, self.device
        return StepOptions(
            device=device,
            max_grad_norm=settings.max_grad_norm,
            autocast=torch.bfloat16 if device.type != "cpu" and plan.dtype == "bfloat16" else None,
            acceleration=acceleration,
            recompute=plan.recompute,
            releases_memory=device.type == "cpu" and plan.is_tight,
            limited_by=next((name for name in ("memory_budget", "fit") if getattr(settings, name) is not None), None),
            loss=self.task.objective.loss_sum,
        )


def _source(settings: TrainSettings, given: TrainSettings, progress: Progress) -> hub.ModelSource:
    """Return the base, which only the start adapter names if the user did not."""
    try:
        return hub.resolve(settings.base, progress.say)
    except ModelError as cause:
        if given.model is not None:
            raise
        text = f"{cause} The adapter {settings.from_adapter} names this base; pass --model if it is somewhere else."
        raise ModelError(text, **{**cause.fields, "field": "model"}) from cause


def _tokenizer(
    settings: TrainSettings, source: hub.ModelSource, start: StartAdapter | None
) -> tuple[SavedTokenizer, bool]:
    """Return the run's tokenizer, with the given chat template, and whether it is one that the start adapter brings."""
    tokenizer = hub.load_tokenizer(source)
    own = None if start is None else own_tokenizer(str(start.adapter.folder), tokenizer)
    chosen = tokenizer if own is None else own
    if settings.chat_template is not None:
        chosen.chat_template = read_template(Path(settings.chat_template))
    return chosen, own is not None


def _forecast(
    settings: TrainSettings,
    source: hub.ModelSource,
    tokenizer: SavedTokenizer,
    task: TaskOnData,
    start: StartAdapter | None,
) -> Forecast:
    """Return the forecast of the run; an adapter that does not fit the base is an error."""
    if start is None:
        return build_forecast(settings, source, tokenizer, task)
    try:
        return build_forecast(settings, source, tokenizer, task, start.adapter.literal)
    except TargetError as cause:
        folder = start.adapter.folder
        text = f"{folder}: the adapter does not match the base {source.base_name}: {cause}"
        raise AdapterFileError(text, **{**cause.fields, "where": folder, "override": None}) from cause


def _check_same_data(folder: Path, record: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    before = record.get("data_sha256", {})
    changed = [path for path in hashes if hashes[path] != before.get(path)]
    if changed:
        raise RunError(
            f"cannot resume {folder}: the data changed: {', '.join(changed)}; restore it, or use another --output-dir.",
            what=changed[0],
            where=folder,
            field="data",
        )


def _check_steps_left(folder: Path, max_steps: int | None) -> None:
    """Raise if the newest valid checkpoint is past `max_steps`; verify checkpoints only if at least one is past it."""
    if max_steps is None or all(run_folder.step_of(path) <= max_steps for path in run_folder.checkpoints(folder)):
        return
    found = checkpoint.newest_valid(folder)
    if found is not None and run_folder.step_of(found) > max_steps:
        raise UsageError(
            f"cannot resume {folder}: max_steps is {max_steps}, but the run is already at {found.name}; pass a larger "
            "--max-steps, or use another --output-dir.",
            what=max_steps,
            where=folder,
            field="max_steps",
        )


@dataclass(frozen=True)
class RunLimits:
    """The length of a run and the intervals between evaluations and between checkpoints.

    Attributes:
        total_steps: Number of optimizer steps in the run.
        accumulation: Number of batches per step; the last step of an epoch may have fewer.
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
    def of(cls, settings: TrainSettings, loader: Loader) -> RunLimits:
        """Compute the limits; by default, the adapter is evaluated and saved after every 10% of the steps.

        Args:
            settings: The run's settings.
            loader: The loader of the training data.
        """
        accumulation = settings.gradient_accumulation_steps
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
        dtype: Precision of the base: "bfloat16" or "float32".
        recompute: What the backward pass recomputes: a value in `lorakit.plan.job.RECOMPUTED`.
        batch_rows: Number of rows per batch.
        accumulation: Number of batches per step.
        values: The plan as plain JSON values.
        proposed: Plans that should fit into the limit of `--fit`, fastest first; empty if nothing is left to choose.
        is_tight: Whether the planned peak is so close to the limit of `--fit` that freed memory must not be kept.
    """

    dtype: str
    recompute: str
    batch_rows: int
    accumulation: int
    values: Mapping[str, Any]
    proposed: tuple[plan.Plan, ...] = ()
    is_tight: bool = False

    @classmethod
    def of(cls, estimated: plan.Plan, limit: str | None = None, proposed: Sequence[plan.Plan] = ()) -> RunPlan:
        """Return the part of a plan that a run needs.

        Args:
            estimated: The plan.
            limit: The setting `fit`.
            proposed: Plans from which one is chosen after a measurement.
        """
        job = estimated.job
        is_tight = limit is not None and needed_bytes(estimated) > ROOMY * plan.bytes_of(limit)
        values = estimated.as_dict()
        return cls(job.dtype, job.recompute, job.batch_rows, job.accumulation, values, tuple(proposed), is_tight)


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


@dataclass
class Run:
    """The context of a run once the weights are loaded.

    Attributes:
        spec: Everything that is known before weights are loaded.
        plan: Precision, recomputation and estimated cost.
        batches: Training and evaluation data.
        limits: Length of the run, and evaluation and checkpoint intervals.
        schedule: Learning rate schedule.
        model: The adapted model.
        named: (name, tensor) pairs for the model's trainable tensors (any shape).
        optimizer: The optimizer for the trainable tensors.
        acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        state: Training state, which the loop updates.
        choices: Autotuned choices to pass to `lorakit.ops.choices.activate`.
        space: Disk space that the run needs.
        base_bytes: Size of the base's weights in memory.
        progress: Receiver of progress reports and messages.
        started: Value of `time.perf_counter()` when `run` was called.
        resumed_from: The checkpoint from which the run was resumed, or None.
        damaged: Damaged checkpoints newer than `resumed_from`.
        trackers: The trackers that receive the metrics; none is open before the run starts.
        status: "running", "failed", "interrupted", "stopped early" or "finished".
        notes: Messages for the user, repeated in the result.
    """

    spec: RunSpec
    plan: RunPlan
    batches: run_data.RunBatches
    limits: RunLimits
    schedule: Schedule
    model: nn.Module
    named: Named
    optimizer: torch.optim.Optimizer
    acceleration: Acceleration | None
    state: TrainState
    choices: Mapping[str, int]
    space: DiskSpace
    base_bytes: int
    progress: Progress
    started: float
    trackers: Trackers
    resumed_from: Path | None = None
    damaged: tuple[Path, ...] = ()
    status: str = "running"
    notes: tuple[str, ...] = ()

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for _, parameter in self.named)

    @property
    def total_parameters(self) -> int:
        """Number of parameters in the base."""
        return self.spec.forecast.shape.parameters

    @property
    def step_options(self) -> StepOptions:
        """Options for `train_step`."""
        return self.spec.step_options(self.plan, self.acceleration)

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
                "quantization": spec.quantization_values,
                "device": str(spec.device),
                "max_length": spec.forecast.max_length,
                "batch_rows": self.plan.batch_rows,
                "recompute": self.plan.recompute,
                **dataclasses.asdict(self.limits),
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
        }
