"""Checks from the base's shape alone: whether targets match, and the maximum length. No weights are loaded.

A run as asked for, after everything that can be refused before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import hub, plan
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, RunError, UsageError
from lorakit.plan.quantized import Quantization
from lorakit.targets import unfitting_keys
from lorakit.train import checkpoint
from lorakit.train.checkpoint import TrainState
from lorakit.train.loop import Pace, Schedule
from lorakit.train.progress import Progress
from lorakit.train.run_data import (
    NewTokens,
    RunBatches,
    RunData,
    add_new_tokens,
    pick_device,
    read_data,
    refuse_many_processes,
    row_length,
)
from lorakit.train.run_folder import check_place, claim_place, data_hashes, read_record
from lorakit.train.settings import TrainSettings
from lorakit.train.settings_sources import resumed
from lorakit.train.step import Trainee


@dataclass(frozen=True)
class Forecast:
    """What is known about a run before its data has been counted.

    Attributes:
        shape: The base's shape.
        config: The adapter's config.
        max_length: Maximum sequence length: the setting, or the model's limit if the setting was left at its default.
        notes: Lines to print.
        new_tokens: Tokens added to the vocabulary, or None.
    """

    shape: plan.ModelShape
    config: LoraConfig
    max_length: int
    notes: tuple[str, ...]
    new_tokens: NewTokens | None = None


def forecast(settings: TrainSettings, source: hub.ModelSource, tokenizer: Any) -> Forecast:
    """Read the model's shape and check targets and length against it; no weights are loaded.

    Args:
        settings: Adapter and length.
        source: The model.
        tokenizer: Its tokenizer, to which new tokens are added.

    Returns:
        The forecast.

    Raises:
        ModelError: The model's config cannot be read, or model or tokenizer cannot take new tokens.
        TargetError: A target matches nothing.
        ConfigError: A key of `learning_rate_pattern` fits no adapted module, or a new token is not new.
        UsageError: `max_length` was given and the model cannot take it.
    """
    shape = hub.shape_of(source)
    config, new = settings.lora_config(), None
    if settings.new_tokens:
        base = hub.skeleton(source)
        new = add_new_tokens(tokenizer, settings.new_tokens, base)
        config = new.config(config, base)
    counted = plan.count(shape, config, allow_partial=settings.allow_partial_targets)
    wrong = unfitting_keys(
        "learning_rate_pattern", settings.learning_rate_pattern, [*(site.path for site in counted.sites), *counted.rows]
    )
    if wrong:
        raise ConfigError(" ".join(map(str, wrong)), what=wrong[0].entry, field="learning_rate_pattern")
    length = row_length(shape, settings.max_length)
    notes = (
        ()
        if length == settings.max_length
        else (f"maximum sequence length: {length:,} tokens, the limit of the model.",)
    )
    return Forecast(shape, config, length, notes, new)


@dataclass(frozen=True)
class Planned:
    """A plan and its text.

    Attributes:
        dtype: Precision of the base: "bfloat16" or "float32".
        recompute: What the backward computes again, a word of `lorakit.plan.job.RECOMPUTED`.
        values: The plan as plain JSON values.
        lines: What is printed.
        details: What is printed with `--verbose`.
    """

    dtype: str
    recompute: str
    values: Mapping[str, Any]
    lines: tuple[str, ...]
    details: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What is known before a weight is loaded.

    Attributes:
        settings: The settings; on resume those of the run.
        folder: The run folder; it exists and can be written to.
        device: Where to compute.
        source: The base.
        data: Records to train and evaluate on.
        hashes: SHA-256 of the data files by path.
        record: `run.json` of the run that is resumed, or None.
        tokenizer: The base's tokenizer, with the run's new tokens.
        forecast: Shape, adapter config and length.
        lock: Descriptor that holds the folder for this process, or -1.
        stored: How the base is stored in fewer bits: as was asked for, or as its files are; None for as it is.
    """

    settings: TrainSettings
    folder: Path
    device: torch.device
    source: hub.ModelSource
    data: RunData
    hashes: Mapping[str, str]
    record: Mapping[str, Any] | None
    tokenizer: Any
    forecast: Forecast
    lock: int
    stored: Quantization | None = None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base is stored in fewer bits, as plain JSON values, or None for as it is."""
        return None if self.stored is None else hub.quantiser_facts(self.stored)


def check(settings: TrainSettings, progress: Progress) -> Request:
    """Refuse what can be refused; nothing is written but an empty folder at the very end.

    Args:
        settings: What was asked for.
        progress: Told before something takes long.

    Returns:
        The request.

    Raises:
        UsageError: Early stopping without evaluation data, a device that is not here, or a folder that holds a run.
        LorakitError: Something cannot be done as asked; class and message say what.
    """
    refuse_many_processes()
    if settings.resume:
        settings = resumed({name: getattr(settings, name) for name in settings.model_fields_set})
    settings.lora_config()
    wanted = settings.stored_as()
    if wanted is not None:
        hub.require_quantiser(wanted)
    device = pick_device(settings.device)
    check_place(settings)
    folder = Path(settings.output_dir)
    data = read_data(settings)
    if settings.early_stopping_patience is not None and not data.held_out:
        raise UsageError(f"early_stopping_patience needs evaluation data. {data.note}", field="early_stopping_patience")
    hashes = data_hashes([*settings.data, *(settings.eval_data or ())])
    record = read_record(folder) if settings.resume else None
    if record is not None:
        _refuse_other_data(folder, record, hashes)
        _refuse_fewer_steps(folder, settings.max_steps)
    source = hub.resolve(settings.model, progress.say)
    hub.require(source, tokenizer=True)
    stored = hub.stored_as_files(source, wanted)
    tokenizer = hub.load_tokenizer(source)
    prospect = forecast(settings, source, tokenizer)
    lock = claim_place(folder)
    return Request(settings, folder, device, source, data, hashes, record, tokenizer, prospect, lock, stored)


def _refuse_other_data(folder: Path, record: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    before = record.get("data_sha256", {})
    changed = [path for path in hashes if hashes[path] != before.get(path)]
    if changed:
        raise RunError(
            f"{folder}: the run cannot go on, because its data changed since it began: {', '.join(changed)}. "
            "Put the file back, or train into a new --output-dir.",
            what=changed[0],
            where=folder,
            field="data",
        )


def _refuse_fewer_steps(folder: Path, max_steps: int | None) -> None:
    """Checkpoints are read only if the name of one says that it has more steps than are asked for."""
    if max_steps is None or all(checkpoint.step_of(path) <= max_steps for path in checkpoint.checkpoints(folder)):
        return
    found = checkpoint.newest_good(folder).path
    if found is not None and checkpoint.step_of(found) > max_steps:
        raise UsageError(
            f"{folder}: max_steps is {max_steps}, but the run is already at {found.name}; pass a larger --max-steps "
            "to train further, or train into a new --output-dir.",
            what=max_steps,
            where=folder,
            field="max_steps",
        )


ADAPTER = "default"
"""Name of the adapter in the model that is trained."""


@dataclass(frozen=True)
class Ready:
    """What the loop and the ending need.

    Attributes:
        request: The request.
        planned: The plan, and the precision of the base.
        batches: Data as batches.
        pace: How long and how often.
        schedule: Learning rate by step.
        trainee: Model and optimizer.
        state: Where the run stands.
        found: The checkpoint that is taken up, and those that were skipped.
        total_parameters: Numbers of the base.
        base_bytes: Their size in memory.
        notes: Sentences a person should read.
        choices: Which way products and attention go (`lorakit.ops.choices.activate`).
    """

    request: Request
    planned: Planned
    batches: RunBatches
    pace: Pace
    schedule: Schedule
    trainee: Trainee
    state: TrainState
    found: checkpoint.Found
    total_parameters: int
    base_bytes: int
    notes: tuple[str, ...]
    choices: Mapping[str, int]

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for _, parameter in self.trainee.named)
