"""Specify a run before any weights are loaded: `build_spec` raises every error that can be detected without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import data, hub, plan
from lorakit.config import LoraConfig
from lorakit.core import check_invocation, invocations_of
from lorakit.core.model.fingerprint import vocabulary_of
from lorakit.core.model.vocabulary import check_growth, with_trained_rows
from lorakit.errors import AdapterFileError, ConfigError, RunError, TargetError, UsageError
from lorakit.machine import this_machine
from lorakit.plan.budget import needed_bytes
from lorakit.plan.job import ASSUMED_LENGTH
from lorakit.plan.params import for_task
from lorakit.session.coding import max_length_for, usual_length
from lorakit.session.spec import resolve_base
from lorakit.session.tokenizers import SavedTokenizer, training_tokenizer
from lorakit.targets.resolving import unfitting_keys
from lorakit.tasks import TASKS, Target, TaskOnData, agree_on_padding, task_for
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.files.trackers import check_trackers
from lorakit.train.loop.optimizer import check_optimizer
from lorakit.train.processes.processes import ALONE, Processes
from lorakit.train.progress import Progress
from lorakit.train.settings.defaults import DEFAULTS
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.settings.sources import resumed
from lorakit.train.setup.agreement import check_sharding, pick_device
from lorakit.train.setup.run_adapter import check_targets, completed, start_adapter
from lorakit.train.setup.run_data import read_data
from lorakit.train.setup.run_int8 import chosen_matmul
from lorakit.train.spec import Forecast, NewTokens, RunSpec, StartAdapter

MINIMUM_ROWS = 2
"""Smallest batch of a task that compares the rows of a batch."""


def build_spec(given: TrainSettings, progress: Progress, processes: Processes = ALONE) -> RunSpec:
    """Check the settings, machine, data, model and run directory, and finally lock the directory.

    Nothing is written, except that the run directory may be created.

    Args:
        given: The given settings; missing ones are taken from the run being resumed.
        progress: Receives messages about slow operations.
        processes: The processes of the run.

    Raises:
        UsageError: The settings are incompatible with the data, this machine or the run directory.
        LorakitError: The data, the model or the run directory cannot be used; the error class and message say why.
    """
    folder = Path(given.output_dir)
    record = run_folder.read_record(folder) if given.resume else None
    if record is not None:
        given = resumed(given.explicit, record)
    device = _machine(given, processes)
    if processes.is_first:
        run_folder.check_output_dir(folder, resume=given.resume, overwrite=given.overwrite)
    resolved = (record or {}).get("resolved") or {}
    start = None if given.from_adapter is None else start_adapter(given, given.from_adapter, record)
    settings = given if start is None or record is not None else completed(start, given)
    records, hashes = _records(settings, start, record, progress)
    source = resolve_base(settings.base, given.model, settings.from_adapter, progress.say)
    hub.require(source, tokenizer=True)
    quantization = hub.stored_as_files(source, settings.stored_as())
    before = _saved_tokenizer(folder, record)
    adapter, template = None if start is None else start.adapter.folder, settings.chat_template
    tokenizer, is_own = training_tokenizer(source, template, settings.new_tokens, adapter=adapter, resumed=before)
    saved = _saved_task(resolved) if start is None else start.task
    task = _chosen_task(settings, records, source, saved, progress.say)
    forecast = _forecast(settings, source, tokenizer, task, records, start, resolved.get("max_length"))
    if start is not None and record is None:
        check_targets(start, given, forecast.shape)
    matmul: str = settings.base_matmul
    if matmul == "int8":
        matmul = chosen_matmul(settings, device, record, forecast.config, progress.say)
    spec = RunSpec(
        settings=settings,
        folder=folder,
        lock=-1,
        device=device,
        source=source,
        data=records,
        hashes=hashes,
        record=record,
        tokenizer=tokenizer,
        tokenizer_sha256=hub.tokenizer_hash(tokenizer),
        task=task,
        forecast=forecast,
        quantization=quantization,
        start=start,
        has_own_tokenizer=is_own or forecast.new_tokens is not None,
        base_matmul=matmul,
        processes=processes,
        progress=progress,
    )
    check_sharding(spec)
    _finish_tokenizer(spec, before)
    return dataclasses.replace(spec, lock=run_folder.lock_output_dir(folder)) if processes.is_first else spec


def _machine(settings: TrainSettings, processes: Processes) -> torch.device:
    """Return the device, after checking what the settings need of this machine and its packages."""
    settings.lora_config()
    quantization = settings.stored_as()
    if quantization is not None:
        hub.require_quantizer(quantization)
    device = pick_device(settings.device, processes)
    check_optimizer(settings.optimizer, device)
    check_trackers(settings.report_to)
    return device


def _records(
    settings: TrainSettings, start: StartAdapter | None, record: Mapping[str, Any] | None, progress: Progress
) -> tuple[data.Split, Mapping[str, str]]:
    """Read the records; return them with the hash of each file, which is that of the run that is resumed."""
    records = read_data(settings, record, progress.say, None if start is None else start.origin.get("rows"))
    if settings.early_stopping_patience is not None and not records.held_out:
        text = f"early_stopping_patience requires evaluation data. {records.note}"
        raise UsageError(text, field="early_stopping_patience")
    hashes = records.digests()
    if record is not None:
        _check_same_run(Path(settings.output_dir), record, hashes, settings.max_steps, progress)
    return records, hashes


def _saved_task(resolved: Mapping[str, Any]) -> TaskOnData | None:
    """Return the task of the run that is resumed if it has labels, which then keep their order; else None."""
    target = Target.from_dict(resolved.get("labels"))
    return None if target is None else TaskOnData(TASKS[resolved["task"]], target)


def _saved_tokenizer(folder: Path, record: Mapping[str, Any] | None) -> SavedTokenizer | None:
    """Return the tokenizer in the checkpoint from which a run is resumed, or None."""
    newest = None if record is None else checkpoint.newest_valid(folder)
    return None if newest is None else hub.adapter_tokenizer(newest)


def _finish_tokenizer(spec: RunSpec, before: SavedTokenizer | None) -> None:
    """Set the padding token, and check that the tokenizer is that of the checkpoint from which a run is resumed."""
    agree_on_padding(spec.task, spec.source, [spec.tokenizer])
    if before is not None and hub.tokenizer_hash(spec.tokenizer) != hub.tokenizer_hash(before):
        text = f"cannot resume {spec.folder}: the base's tokenizer changed; restore it, or use another --output-dir."
        raise RunError(text, what="tokenizer", where=spec.folder, field="model")


def _check_same_run(
    folder: Path, record: Mapping[str, Any], hashes: Mapping[str, str], max_steps: int | None, progress: Progress
) -> None:
    """Check that a run that is resumed has the same data and steps left, and say what was compared."""
    before = record.get("data_sha256", {})
    changed = [path for path in hashes if hashes[path] != before.get(path)]
    if changed:
        text = (
            f"cannot resume {folder}: the data changed: {', '.join(changed)}; restore it, or use another --output-dir."
        )
        raise RunError(text, what=changed[0], where=folder, field="data")
    if any(value.startswith(data.PARTIAL) for value in hashes.values()):
        progress.say(
            "Streamed data was compared with that of the start by size, modification time, and the first and last MiB "
            "(on the Hub, by revision); other changes are not noticed."
        )
    _check_steps_left(folder, max_steps)


def _check_steps_left(folder: Path, max_steps: int | None) -> None:
    """Raise if the newest valid checkpoint is past `max_steps`; verify checkpoints only if at least one is past it."""
    if max_steps is None or all(run_folder.step_of(path) <= max_steps for path in run_folder.checkpoints(folder)):
        return
    newest = checkpoint.newest_valid(folder)
    if newest is not None and run_folder.step_of(newest) > max_steps:
        text = (
            f"cannot resume {folder}: max_steps is {max_steps}, but the run is already at {newest.name}; pass a larger "
            "--max-steps, or use another --output-dir."
        )
        raise UsageError(text, what=max_steps, where=folder, field="max_steps")


def _chosen_task(
    settings: TrainSettings,
    records: data.Split,
    source: hub.ModelSource,
    saved: TaskOnData | None,
    say: Callable[[str], None],
) -> TaskOnData:
    """Choose the task of a run, and check that the settings apply to it.

    `saved` is the task of the adapter that the run starts from, or of the run that is resumed, or None. `say` receives
    a message before the labels of a stream are read, which may take minutes.

    Raises:
        UsageError: No task fits the data and the model, or a setting does not apply to the task.
        DataError: The labels cannot be used.
    """
    name: str | None = settings.task
    if saved is not None and name not in (None, saved.task.name):
        text = f"task is {name}, but the adapter was trained for {saved.task.name}; omit it."
        raise UsageError(text, what=name, field="task")
    is_streamed = isinstance(records, data.StreamSplit)
    if is_streamed and isinstance(next(iter(records.train), None), data.Labeled | data.Tagged):
        say("Reading the labels of all rows, because they must be known before the first step.")
    task = task_for(name, records, source, settings.label_options(), saved)
    unused = [] if task.task.generates else ["chat_template", "new_tokens"]
    unused += [] if task.task.loader == "classification" else ["label_type"]
    for setting in unused:
        value = getattr(settings, setting)
        if value != DEFAULTS[setting].value:
            text = f"{setting} does not apply to the task {task.task.name}; omit it."
            raise UsageError(text, what=value, field=setting)
    if task.task.needs_batch and settings.fit is not None:
        raise UsageError(
            f"fit would change the batches, which the task {task.task.name} compares row by row; omit it.",
            what=settings.fit,
            field="fit",
        )
    if task.task.needs_batch and settings.per_device_train_batch_size < MINIMUM_ROWS:
        raise UsageError(
            f"per_device_train_batch_size is {settings.per_device_train_batch_size}, but the task {task.task.name} "
            f"compares the rows of a batch; pass at least {MINIMUM_ROWS}, better 16 or more.",
            what=settings.per_device_train_batch_size,
            field="per_device_train_batch_size",
        )
    return task


def _forecast(
    settings: TrainSettings,
    source: hub.ModelSource,
    tokenizer: SavedTokenizer,
    task: TaskOnData,
    records: data.Split,
    start: StartAdapter | None,
    recorded: int | None,
) -> Forecast:
    """Read the model's shape and check the targets and the maximum length against it; no weights are loaded.

    New tokens are added to the tokenizer in place. `recorded` is the maximum length of a resumed run.

    Raises:
        ModelError: The model's config cannot be read, or the model or the tokenizer does not support new tokens.
        TargetError: A target of a new adapter matches nothing.
        AdapterFileError: The adapter that the run starts from does not match the base.
        ConfigError: A key in `learning_rate_pattern` matches no adapted module, a new token already exists, or the
            adapter waits for tokens that do not exist.
        UsageError: `max_length` exceeds the model's limit.
    """
    shape = hub.shape_for_task(source, task.task.loader, task.target.config_values())
    new, notes = None, [task.note] if task.note else []
    if start is None:
        given = settings.lora_config(task.task.adapter_task)
        config = for_task(given, shape)
        if config.exclude_modules != given.exclude_modules:
            notes.append(f"not adapted, because the task does not use their output: {', '.join(shape.unused_modules)}")
    else:
        config = start.adapter.literal
    if settings.new_tokens:
        base = hub.skeleton(source)
        new = add_new_tokens(tokenizer, settings.new_tokens, base)
        config = with_trained_rows(config, base, new.rows)
        words = ", ".join(f"{token} ({number})" for token, number in new.added.ids.items())
        notes.append(f"New tokens: {words}; in the embedding and the head, only the rows of these tokens are trained.")
    try:
        length, reason = _length(
            settings, shape, config, lambda: usual_length(records.train, tokenizer, task), recorded
        )
        notes += [f"maximum sequence length: {length:,} tokens ({reason})"] if reason else []
        if invocations_of(config):
            check_invocation(config, set(tokenizer.get_vocab().values()), "the tokenizer", length)
        counted = plan.count(shape, config, allow_partial=settings.allow_partial_targets)
    except TargetError as cause:
        if start is None:
            raise
        folder = start.adapter.folder
        text = f"{folder}: the adapter does not match the base {source.base_name}: {cause}"
        raise AdapterFileError(text, **{**cause.fields, "where": folder, "override": None}) from cause
    wrong = unfitting_keys(
        "learning_rate_pattern", settings.learning_rate_pattern, [*(site.path for site in counted.sites), *counted.rows]
    )
    if wrong:
        raise ConfigError(" ".join(map(str, wrong)), what=wrong[0].entry, field="learning_rate_pattern")
    return Forecast(shape, config, length, tuple(notes), new)


def _length(
    settings: TrainSettings, shape: plan.ModelShape, config: LoraConfig, usual: Callable[[], int], recorded: int | None
) -> tuple[int, str]:
    """Return the maximum sequence length, and the reason if it is chosen here; a resumed run keeps its recorded one."""
    if recorded is not None or settings.max_length is not None:
        return recorded or max_length_for(shape, settings.max_length, usual), ""
    by_data = usual()
    length = min(by_data, shape.positions or by_data)
    fitting = fitting_length(length, shape, config, settings)
    if fitting < length:
        return fitting, f"{length:,} would exceed the memory"
    if length < by_data:
        return length, "the model's limit"
    return length, "at least 99% of the rows are not longer" if length != ASSUMED_LENGTH else "documents are split"


def fitting_length(length: int, shape: plan.ModelShape, config: LoraConfig, settings: TrainSettings) -> int:
    """Return a length in tokens whose planned memory fits: halved as often as needed, down to `ASSUMED_LENGTH`.

    A limit of memory in the settings selects the smallest batch and the most recomputation.
    """
    given = settings.fit or settings.memory_budget
    limit = plan.bytes_of(given) if given else _memory_bytes(settings.device)
    smallest = ({"batch_rows": 1} if settings.fit else {}) | ({"recompute": "layers"} if given else {})
    while limit is not None and length > ASSUMED_LENGTH:
        job = plan.Job.of(
            settings,
            length_tokens=length,
            accumulation=1,
            dtype=shape.dtype if settings.dtype == "auto" else settings.dtype,
            **smallest,
        )
        if needed_bytes(plan.estimate(shape, config, job, allow_partial=settings.allow_partial_targets)) <= limit:
            break
        length = max(ASSUMED_LENGTH, length // 2)
    return length


def _memory_bytes(device: str) -> int | None:
    """Return the memory of the device that the setting selects, in bytes; None if it is not known."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return this_machine().memory_bytes if device in ("auto", "cpu") else None


def add_new_tokens(tokenizer: data.Tokenizer, tokens: list[str], base: nn.Module) -> NewTokens:
    """Add tokens to a run's tokenizer in place; return them with the embedding rows that the base needs for them.

    Raises:
        ConfigError: A token is already in the vocabulary.
        ModelError: The tokenizer or the base does not support new tokens.
    """
    added = hub.add_tokens(tokenizer, tokens)
    present = vocabulary_of(base)
    check_growth(base, added.vocabulary)
    rows = sorted({*added.ids.values(), *range(present, added.vocabulary)})
    return NewTokens(added, max(present, added.vocabulary), tuple(rows))
