"""The specification of a run, created before any weights are loaded: `RunSpec`.

`RunSpec.of` raises every error that can be detected without weights. What is known later is in `run_context.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import hub
from lorakit.data import PARTIAL, Split
from lorakit.errors import AdapterFileError, RunError, TargetError, UsageError
from lorakit.plan.quantized import Quantization
from lorakit.session.remembered import resolve_base
from lorakit.session.tokenizers import SavedTokenizer, training_tokenizer
from lorakit.tasks import TASKS, Target, TaskOnData, agree_on_padding
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.files.trackers import check_trackers
from lorakit.train.loop.optimizer import check_optimizer
from lorakit.train.loop.progress import Progress
from lorakit.train.processes.processes import ALONE, Processes
from lorakit.train.processes.sharding import check_sharding
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.settings.sources import complete
from lorakit.train.setup import run_data
from lorakit.train.setup.forecast import Forecast, chosen_task, pick_device
from lorakit.train.setup.forecast import forecast as build_forecast
from lorakit.train.setup.run_int8 import check_adapter, chosen_matmul
from lorakit.train.setup.start_adapter import StartAdapter, start_adapter

ADAPTER = "default"
"""Name under which the run's adapter is attached to the model."""


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
        tokenizer_sha256: SHA-256 of the tokenizer, computed once, because that takes a third of a second.
        task: The task, and what it predicts for this data.
        forecast: The base's shape, the adapter config, and the maximum sequence length.
        quantization: Quantization of the base, from the settings or the base's files, or None.
        start: The adapter that the run starts from, or None.
        has_own_tokenizer: Whether the tokenizer or its chat template differs from the base's.
        base_matmul: How the base is multiplied: "dtype" or "int8", as the settings and the machine allow.
        processes: The processes of the run, of which only the first one locks the directory.
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

    @classmethod
    def of(cls, settings: TrainSettings, progress: Progress, processes: Processes = ALONE) -> RunSpec:
        """Check the settings, machine, data, model and run directory, and finally lock the directory.

        Args:
            settings: The given settings; missing ones are taken from the run being resumed.
            progress: Receives messages about slow operations.
            processes: The processes of the run.

        Returns:
            The specification; nothing has been written yet, except that the run directory may have been created.

        Raises:
            UsageError: The settings are incompatible with the data, this machine or the run directory.
            LorakitError: The data, the model or the run directory cannot be used; the error class and message say why.
        """
        settings = given = complete(settings)
        settings.lora_config()
        quantization = settings.stored_as()
        if quantization is not None:
            hub.require_quantizer(quantization)
        device = pick_device(settings.device, processes)
        check_optimizer(settings.optimizer, device)
        check_trackers(settings.report_to)
        if processes.is_first:
            run_folder.check_output_dir(settings)
        folder = Path(settings.output_dir)
        record = run_folder.read_record(folder) if settings.resume else None
        start = start_adapter(settings, record)
        if start is not None and record is None:
            settings = start.completed(settings)
        data = run_data.read_data(settings, record, progress.say, None if start is None else start.origin.get("rows"))
        if settings.early_stopping_patience is not None and not data.held_out:
            raise UsageError(
                f"early_stopping_patience requires evaluation data. {data.note}", field="early_stopping_patience"
            )
        hashes = data.digests()
        if record is not None:
            _check_same_run(folder, record, hashes, settings.max_steps, progress)
        source = resolve_base(settings.base, given.model, settings.from_adapter, progress.say)
        hub.require(source, tokenizer=True)
        quantization = hub.stored_as_files(source, quantization)
        before = _saved_tokenizer(folder, record)
        adapter, template = None if start is None else start.adapter.folder, settings.chat_template
        tokenizer, is_own = training_tokenizer(source, template, settings.new_tokens, adapter=adapter, resumed=before)
        saved = _saved_task(record) if start is None else start.task
        task = chosen_task(settings, data, source, saved, progress.say)
        found = _forecast(settings, source, tokenizer, task, start, data, record)
        if start is not None and record is None:
            start.check_targets(given, found.shape)
        matmul = chosen_matmul(settings, device, record, progress.say)
        if matmul == "int8":
            check_adapter(found.config)
        spec = cls(
            settings=settings,
            folder=folder,
            lock=-1,
            device=device,
            source=source,
            data=data,
            hashes=hashes,
            record=record,
            tokenizer=tokenizer,
            tokenizer_sha256=hub.tokenizer_hash(tokenizer),
            task=task,
            forecast=found,
            quantization=quantization,
            start=start,
            has_own_tokenizer=is_own or found.new_tokens is not None,
            base_matmul=matmul,
            processes=processes,
        )
        check_sharding(spec)
        _finish_tokenizer(tokenizer, task, source, folder, before)
        return dataclasses.replace(spec, lock=run_folder.lock_output_dir(folder)) if processes.is_first else spec

    @property
    def initial_processes(self) -> int:
        """Number of processes with which the run was started, which determines the number of rows per step."""
        resolved = (self.record or {}).get("resolved") or {}
        return int(resolved.get("processes") or 1) if resolved else self.processes.count

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


def _saved_task(record: Mapping[str, Any] | None) -> TaskOnData | None:
    """Return the task of the run that is resumed if it has labels, which then keep their order; else None."""
    resolved = (record or {}).get("resolved") or {}
    target = Target.from_dict(resolved.get("labels"))
    return None if target is None else TaskOnData(TASKS[resolved["task"]], target)


def _saved_tokenizer(folder: Path, record: Mapping[str, Any] | None) -> SavedTokenizer | None:
    """Return the tokenizer in the checkpoint from which a run is resumed, or None."""
    found = None if record is None else checkpoint.newest_valid(folder)
    return None if found is None else hub.adapter_tokenizer(found)


def _finish_tokenizer(
    tokenizer: SavedTokenizer, task: TaskOnData, source: hub.ModelSource, folder: Path, before: SavedTokenizer | None
) -> None:
    """Set the padding token, and check that the tokenizer is that of the checkpoint from which a run is resumed."""
    agree_on_padding(task, source, [tokenizer])
    if before is not None and hub.tokenizer_hash(tokenizer) != hub.tokenizer_hash(before):
        raise RunError(
            f"cannot resume {folder}: the base's tokenizer changed; restore it, or use another --output-dir.",
            what="tokenizer",
            where=folder,
            field="model",
        )


def _forecast(
    settings: TrainSettings,
    source: hub.ModelSource,
    tokenizer: SavedTokenizer,
    task: TaskOnData,
    start: StartAdapter | None,
    records: Split,
    record: Mapping[str, Any] | None,
) -> Forecast:
    """Return the forecast of the run; an adapter that does not fit the base is an error."""
    config = None if start is None else start.adapter.literal
    recorded = ((record or {}).get("resolved") or {}).get("max_length")
    try:
        return build_forecast(settings, source, tokenizer, task, records, config, recorded)
    except TargetError as cause:
        if start is None:
            raise
        folder = start.adapter.folder
        text = f"{folder}: the adapter does not match the base {source.base_name}: {cause}"
        raise AdapterFileError(text, **{**cause.fields, "where": folder, "override": None}) from cause


def _check_same_run(
    folder: Path, record: Mapping[str, Any], hashes: Mapping[str, str], max_steps: int | None, progress: Progress
) -> None:
    """Check that a run that is resumed has the same data and steps left, and say what was compared."""
    before = record.get("data_sha256", {})
    changed = [path for path in hashes if hashes[path] != before.get(path)]
    if changed:
        raise RunError(
            f"cannot resume {folder}: the data changed: {', '.join(changed)}; restore it, or use another --output-dir.",
            what=changed[0],
            where=folder,
            field="data",
        )
    if any(value.startswith(PARTIAL) for value in hashes.values()):
        progress.say(
            "Streamed data was compared with that of the start by size, modification time, and the first and last MiB "
            "(on the Hub, by revision); other changes are not noticed."
        )
    _check_steps_left(folder, max_steps)


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
