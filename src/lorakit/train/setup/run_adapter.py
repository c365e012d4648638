"""The adapter of a run: attach or load it, compute ranks and initial weights, read the one that a run starts from.

`lorakit.core.operations` defines how ranks and initial weights are computed from data. This module supplies the data:
training rows in the order of the run's first epoch, one at a time, so that less memory is used than in a training step.
Supplying these rows draws no random numbers and does not advance the run's data loader. The structure of an adapter to
start from comes from its config: a given setting must be equal to it. A resumed run loads the adapter of its newest
checkpoint instead, so that the original one is not needed anymore.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lorakit import core, plan
from lorakit.choices import PARAMETER
from lorakit.config import LoraConfig
from lorakit.core.inits import init_named
from lorakit.core.model.vocabulary import grow_vocabulary, initialize_rows, with_trained_rows
from lorakit.core.operations.data_init import allocate
from lorakit.data import Batch, BatchLoader, Loader, StreamLoader
from lorakit.durable import as_object
from lorakit.errors import AdapterFileError, ConfigError, LorakitError, RunError, TargetError, UsageError
from lorakit.hub_cache import adapter_from_hub, find_adapter, is_on_hub
from lorakit.session.spec import recorded_base
from lorakit.tables import format_count
from lorakit.terminal import working
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.loop.run import RunInt8
from lorakit.train.settings.defaults import DEFAULTS
from lorakit.train.settings.settings import TrainSettings, names_in_config
from lorakit.train.setup.run_int8 import MOST_TOKENS, CalibrationRows, calibration_rows, quantized_base
from lorakit.train.spec import ADAPTER, NewTokens, RunSpec, StartAdapter

if TYPE_CHECKING:
    from lorakit.durable import JsonObject, JsonValue


ROWS = 32
"""Number of training rows from which ranks and initial weights are computed."""


def add_adapter(
    model: nn.Module, config: LoraConfig, spec: RunSpec, loader: BatchLoader, checkpoint: Path | None
) -> tuple[str, ...]:
    """Add embedding rows for new tokens to the base, then attach a new adapter or load an existing one.

    An existing adapter is that of the checkpoint, or else the one that the run starts from. The loader does not
    advance. Return messages for the user.

    Raises:
        LorakitError: The adapter cannot be attached or loaded; the error class and message say why.
    """
    settings, new = spec.settings, spec.forecast.new_tokens
    unseen = () if new is None else _unseen(new, loader)
    if new is not None:
        grow_vocabulary(model, new.vocabulary)
    if checkpoint is not None:
        spec.progress.say(f"Resuming from {checkpoint}.")
        return core.load_adapter(model, checkpoint, ADAPTER, trainable=True).warnings + unseen
    if settings.resume:
        spec.progress.say(f"{spec.folder}: no valid checkpoint; the run starts from the beginning.")
    if spec.start is not None:
        return _load_start(model, spec.start, spec)
    if settings.allocate_ranks != "none":
        config = allocate_ranks(model, config, spec, settings.allocate_ranks, loader)
    if new is not None:
        config = with_trained_rows(config, model, new.rows)
    config, statistics = init_from_data(model, config, spec, loader)
    report = core.attach(model, config, ADAPTER, allow=_allow(spec), seed=settings.seed, statistics=statistics)
    if new is not None:
        initialize_rows(model, ADAPTER, new.added.pieces)
    return (*map(str, report.notes), *unseen)


def _unseen(new: NewTokens, loader: BatchLoader) -> tuple[str, ...]:
    """Return a tuple with a warning if any new tokens do not occur in the training data, or else an empty tuple."""
    seen = Counter(number for sequence in loader.sequences for number in sequence.input_ids)
    never = ", ".join(token for token, number in new.added.ids.items() if not seen[number])
    if not never:
        return ()
    if isinstance(loader, StreamLoader):
        return (f"These new tokens are not in the first part of the training data: {never}.",)
    return (f"These new tokens are not in the training data, so their rows stay untrained: {never}.",)


def _load_start(model: nn.Module, start: StartAdapter, spec: RunSpec) -> tuple[str, ...]:
    """Load the adapter that a run starts from, and return messages for the user."""
    steps = start.origin["steps"]
    trained = "" if steps is None else f" (trained for {format_count(steps, 'step')})"
    spec.progress.say(f"Training the adapter in {start.adapter.folder} further{trained}.")
    try:
        return core.load_adapter(model, start.adapter.folder, ADAPTER, trainable=True).warnings
    except AdapterFileError as cause:  # a run has no setting that overrides the check
        raise type(cause)(cause.message, **{**cause.fields, "override": None}) from cause


def allocate_ranks(
    model: nn.Module, config: LoraConfig, spec: RunSpec, by: Literal["gradients", "inputs"], loader: BatchLoader
) -> LoraConfig:
    """Return an adapter config with ranks computed from the base and the first training rows.

    The adapter has no more trainable parameters than with the given config. Errors are those of `allocate`.
    """
    rows = first_rows(spec, loader)
    with working(f"allocating ranks from {format_count(len(rows), 'row')}"):
        allocated = allocate(model, config, rows, row_loss(spec), by=by, allow=_allow(spec))
    ranks = sorted(allocated.ranks.values())
    spec.progress.say(
        f"Ranks allocated by {by} over {format_count(len(rows), 'row')}: {ranks[0]} to {ranks[-1]}, median "
        f"{ranks[len(ranks) // 2]}; {allocated.parameters:,} parameters in A and B (budget {allocated.budget:,}, "
        f"from r = {spec.settings.r})."
    )
    return allocated.config


def init_from_data(
    model: nn.Module, config: LoraConfig, spec: RunSpec, loader: BatchLoader
) -> tuple[LoraConfig, core.Statistics | None]:
    """Return the adapter's config and, if the initialization needs them, statistics of the first training rows.

    The config has the computed ranks of EVA. The loader does not advance.

    Raises:
        UsageError: The initialization would change a quantized base.
        LorakitError: `lorakit.core.collect_for` failed; the error class and message say why.
    """
    init = init_named(config.init_lora_weights)
    if init.changes_base and spec.quantization is not None:
        text = (
            f"init_lora_weights={init.name!r} changes the base weights, but this base is quantized, so the changed "
            "weights would have to be requantized; omit --quantization or use another initialization."
        )
        raise UsageError(text, what=init.name, field="init_lora_weights")
    if not init.needs:
        return config, None
    rows = first_rows(spec, loader)
    keep = _positions_with_loss if init.name == "eva" else None
    with working(f"collecting statistics from {format_count(len(rows), 'row')} for {init.name}"):
        statistics = core.collect_for(model, config, rows, row_loss(spec), keep=keep, allow=_allow(spec))
    ranks = sorted(set(statistics.config.rank_pattern.values()) | {statistics.config.r})
    spread = f", ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ""
    spec.progress.say(f"Adapter initialized by {init.name} from {format_count(len(rows), 'row')}{spread}.")
    return statistics.config, statistics


def first_rows(spec: RunSpec, loader: BatchLoader) -> list[Batch]:
    """Return the first training rows with loss, one per batch, in the order of the run's first epoch."""
    collate, pad, seed = spec.task.objective.collate, loader.pad_id, spec.settings.seed
    weights = loader.weights if isinstance(loader, Loader) else ()
    singles = Loader(loader.sequences, 1, seed, epochs=1, pad_id=pad, weights=weights, collate=collate)
    return [batch for batch in islice(singles, ROWS) if batch.trained_tokens]


def quantized_run_base(model: nn.Module, spec: RunSpec, loader: BatchLoader) -> RunInt8 | None:
    """Quantize the base of a run in place if it is to be multiplied in int8; see `quantized_base`."""
    if spec.base_matmul != "int8":
        return None
    batch_tokens = min(loader.batch_rows * spec.forecast.max_length, MOST_TOKENS)
    first, losses, device = calibration_rows(first_rows(spec, loader)), spec.task.objective.row_losses, spec.device
    by_row = None if losses is None else lambda model, batch: losses(model, batch, device)
    rows = CalibrationRows(first, loader.pad_id, batch_tokens, row_loss(spec), by_row)
    return quantized_base(model, spec, rows)


def row_loss(spec: RunSpec) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a function that computes a model's mean loss on a batch, a scalar."""
    loss_sum = spec.task.objective.loss_sum

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        parameter = next(model.parameters())
        device, is_wide = parameter.device, parameter.device.type == "cpu" or parameter.dtype == torch.float32
        dtype = torch.float16 if parameter.dtype == torch.float16 else torch.bfloat16
        with contextlib.nullcontext() if is_wide else torch.autocast(device.type, dtype=dtype):
            return loss_sum(model, batch, device, None) / batch.trained_tokens

    return loss


def _positions_with_loss(batch: Batch) -> Tensor:
    """Return a (rows, length) mask of the positions that contribute to the loss (`use_label_mask` in PEFT's EVA).

    If the labels belong to rows, these are all positions with a token.
    """
    mask = batch.attention_mask.bool()
    return (batch.labels != -100) & mask if batch.labels.shape == mask.shape else mask


def _allow(spec: RunSpec) -> tuple[str, ...]:
    return ("partial_targets",) if spec.settings.allow_partial_targets else ()


def start_adapter(settings: TrainSettings, name: str, record: Mapping[str, Any] | None) -> StartAdapter:
    """Read the adapter that a run starts from, with this value of `from_adapter`.

    `record` has the contents of `run.json` if the run is resumed.

    Raises:
        AdapterFileError: The adapter is missing, damaged or not supported.
        ModelError: The adapter is on the Hub and cannot be downloaded.
        UsageError: `overwrite` would remove the adapter.
        RunError: The optimizer state cannot be used; or the run is resumed without a valid checkpoint, and the adapter
            has changed.
    """
    folder = Path(settings.output_dir)
    saved = checkpoint.newest_valid(folder) if record is not None else None
    if record is not None and saved is not None:
        return StartAdapter(core.read_for_training(saved), dict(record.get("from_adapter") or {}))
    found = adapter_from_hub(name, has_tokenizer=True) if is_on_hub(name) else find_adapter(name, "from_adapter")
    adapter = core.read_for_training(found)
    if settings.overwrite and folder.resolve() in adapter.folder.resolve().parents:
        text = f"{name} is in {folder}, and --overwrite would remove it; use another --output-dir."
        raise UsageError(text, what=name, where=folder, field="overwrite")
    origin = _origin(name, adapter)
    before = None if record is None else record.get("from_adapter") or {}
    if before is not None and {**before, "rows": None} != {**origin, "rows": None}:
        text = (
            f"cannot resume {folder}: it has no valid checkpoint, and {name} is not the adapter that "
            "the run started from; restore that adapter, or use another --output-dir."
        )
        raise RunError(text, what=name, where=folder, field="from_adapter")
    optimizer = _optimizer(adapter, settings) if settings.from_optimizer else None
    return StartAdapter(adapter, origin if before is None else before, optimizer)


def completed(start: StartAdapter, settings: TrainSettings) -> TrainSettings:
    """Return the settings with the structure of the adapter and, if it is missing, the base that the adapter names.

    Explicitly given settings are compared with the adapter.

    Raises:
        UsageError: A given setting differs from the adapter, or applies only to a new adapter; or the adapter does
            not name its base.
    """
    given = settings.model_fields_set
    folder, structure = start.adapter.folder, _structure(start.adapter.config)
    wanted = _structure(settings.lora_config())
    for name, entry in DEFAULTS.items():
        if entry.is_for_new and name in given and getattr(settings, name) != entry.value:
            text = (
                f"{name} is {getattr(settings, name)!r}, but {folder} is an existing adapter, and this setting "
                "applies only to a new one; omit it, or omit --from-adapter."
            )
            raise UsageError(text, what=getattr(settings, name), where=folder, field=name)
    wrong = [n for n in structure if n in given and n != "target_modules" and wanted[n] != structure[n]]
    if wrong:
        raise _different(folder, {name: (wanted[name], structure[name]) for name in wrong})
    values = {**settings.as_dict(), **structure}
    if settings.model is None:
        values["model"] = base = recorded_base(start.adapter.folder, start.adapter.config, start.adapter.facts)
        if settings.revision is None and is_on_hub(base):
            values["revision"] = start.adapter.config.revision
    return TrainSettings(**values)


def check_targets(start: StartAdapter, settings: TrainSettings, shape: plan.ModelShape) -> None:
    """Raise UsageError if the given `target_modules` select other sites than those of the adapter."""
    wanted = settings.lora_config()
    given, own = (_structure(config)["target_modules"] for config in (wanted, start.adapter.config))
    if "target_modules" not in settings.model_fields_set or given == own:
        return
    try:
        sites = plan.count(shape, wanted.with_fields(rank_pattern={}, trainable_token_indices=None)).sites
    except (TargetError, ConfigError):
        sites = ()
    if {site.path for site in sites if site.kind != PARAMETER} != set(start.adapter.sites):
        raise _different(start.adapter.folder, {"target_modules": (given, own)})


def _origin(given: str, adapter: core.TrainedAdapter) -> JsonObject:
    training = as_object(adapter.facts.get("training"))
    steps, start = _steps(training), as_object(training.get("from_adapter"))
    if steps is not None and start:
        before = start.get("steps")
        steps = steps + before if isinstance(before, int) else None
    base = adapter.facts.get("base_name") or adapter.config.base_model_name_or_path
    rows = {name: training.get(name) for name in ("shape", "columns")} if training else None
    return {"name": given, "sha256": adapter.weights_sha256, "base_name": base, "steps": steps, "rows": rows}


def _steps(training: JsonValue) -> int | None:
    """Return the step of an adapter within its own run, from its training metadata."""
    step = as_object(training).get("step")
    return step if isinstance(step, int) else None


def _optimizer(adapter: core.TrainedAdapter, settings: TrainSettings) -> Path:
    """Return the checkpoint with the optimizer state at the adapter's step, after verifying it."""
    folder, step = adapter.folder, _steps(adapter.facts.get("training"))
    path = folder if (folder / checkpoint.MANIFEST).is_file() else folder.parent / f"checkpoint-{step}"
    try:
        checkpoint.verify(path)
        same = core.read_for_training(path).weights_sha256 == adapter.weights_sha256
        record = run_folder.read_record(path.parent)
    except LorakitError as cause:
        raise _no_optimizer(folder, f"{path} is not a valid checkpoint ({cause})") from cause
    if not same:
        raise _no_optimizer(folder, f"{path} contains another adapter")
    before = (record or {}).get("settings", {}).get("optimizer")
    if before != settings.optimizer:
        raise _no_optimizer(folder, f"optimizer is {settings.optimizer!r}, but its run used {before!r}")
    return path


def _no_optimizer(folder: Path, reason: str) -> RunError:
    text = (
        f"{folder}: the optimizer state cannot be restored: {reason}; omit --from-optimizer to start with a new "
        "optimizer, or pass a checkpoint of the run as --from-adapter."
    )
    return RunError(text, what=reason, where=folder, field="from_optimizer")


def _different(folder: Path, pairs: Mapping[str, tuple[JsonValue, JsonValue]]) -> UsageError:
    name, (given, _) = next(iter(pairs.items()))
    listed = "; ".join(f"{name} is {given!r}, but the adapter has {own!r}" for name, (given, own) in pairs.items())
    text = f"{folder} cannot be trained further with other settings: {listed}; omit them to keep those of the adapter."
    return UsageError(text, what=given, where=folder, field=name)


def _structure(config: LoraConfig) -> JsonObject:
    """Return the fields that an existing adapter determines, as values of settings in a form that can be compared."""
    names = [name for name in names_in_config(config) if not DEFAULTS[name].is_for_new]
    return {name: _plain(name, getattr(config, name)) for name in names}


def _plain(name: str, value: Any) -> JsonValue:
    if isinstance(DEFAULTS[name].value, bool):
        return bool(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if name in ("layers_to_transform", "layers_pattern") and isinstance(value, (int, str)):
        return [value]
    return None if value == [] else value
