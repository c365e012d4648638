"""A run as asked for, after everything that can be refused before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import hub
from lorakit.errors import RunError, UsageError
from lorakit.plan.quantised import Quantization
from lorakit.train import checkpoint
from lorakit.train.forecast import Forecast, forecast
from lorakit.train.preparing import (
    RunData,
    check_place,
    claim_place,
    pick_device,
    read_data,
    refuse_many_processes,
)
from lorakit.train.progress import Progress
from lorakit.train.record import data_hashes, read_record
from lorakit.train.settings import TrainSettings
from lorakit.train.sources import resumed


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
        raise UsageError(f"early_stopping_patience needs evaluation data. {data.note}")
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
            "Put the file back, or train into a new --output-dir."
        )


def _refuse_fewer_steps(folder: Path, max_steps: int | None) -> None:
    """Checkpoints are read only if the name of one says that it has more steps than are asked for."""
    if max_steps is None or all(checkpoint.step_of(path) <= max_steps for path in checkpoint.checkpoints(folder)):
        return
    found = checkpoint.newest_good(folder).path
    if found is not None and checkpoint.step_of(found) > max_steps:
        raise UsageError(
            f"{folder}: max_steps is {max_steps}, but the run is already at {found.name}; pass a larger --max-steps "
            "to train further, or train into a new --output-dir."
        )
