"""The adapter of a run: attach or load it, compute ranks and initial weights from the first training rows, and save it.

`lorakit.core.operations` defines how ranks and initial weights are computed from data. This module supplies the data:
training rows in the order of the run's first epoch, one at a time, so that less memory is used than in a training step.
Supplying these rows draws no random numbers and does not advance the run's data loader. A resumed run instead loads
its adapter from the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.inits import init_named
from lorakit.core.model.vocabulary import grow_vocabulary, initialize_rows, with_trained_rows
from lorakit.core.operations.rank_allocation import allocate
from lorakit.data import Batch, BatchLoader, Loader, StreamLoader
from lorakit.errors import AdapterFileError, UsageError
from lorakit.tables import format_count
from lorakit.terminal import working
from lorakit.train.loop.progress import Progress
from lorakit.train.loop.run import RunInt8
from lorakit.train.setup.run_int8 import MOST_TOKENS, CalibrationRows, calibration_rows, quantized_base
from lorakit.train.spec import ADAPTER, NewTokens, RunSpec, StartAdapter

ROWS = 32
"""Number of training rows from which ranks and initial weights are computed."""


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    spec: RunSpec,
    loader: BatchLoader,
    checkpoint: Path | None,
    progress: Progress,
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
        progress.say(f"Resuming from {checkpoint}.")
        return core.load_adapter(model, checkpoint, ADAPTER, trainable=True).warnings + unseen
    if settings.resume:
        progress.say(f"{spec.folder}: no valid checkpoint; the run starts from the beginning.")
    if spec.start is not None:
        return _load_start(model, spec.start, progress)
    if settings.allocate_ranks != "none":
        config = allocate_ranks(model, config, spec, settings.allocate_ranks, loader, progress)
    if new is not None:
        config = with_trained_rows(config, model, new.rows)
    config, statistics = init_from_data(model, config, spec, loader, progress)
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


def _load_start(model: nn.Module, start: StartAdapter, progress: Progress) -> tuple[str, ...]:
    """Load the adapter that a run starts from, and return messages for the user."""
    steps = start.origin["steps"]
    trained = "" if steps is None else f" (trained for {format_count(steps, 'step')})"
    progress.say(f"Training the adapter in {start.adapter.folder} further{trained}.")
    try:
        return core.load_adapter(model, start.adapter.folder, ADAPTER, trainable=True).warnings
    except AdapterFileError as cause:  # a run has no setting that overrides the check
        raise type(cause)(cause.message, **{**cause.fields, "override": None}) from cause


def allocate_ranks(
    model: nn.Module,
    config: LoraConfig,
    spec: RunSpec,
    by: Literal["gradients", "inputs"],
    loader: BatchLoader,
    progress: Progress,
) -> LoraConfig:
    """Return an adapter config with ranks computed from the base and the first training rows.

    The adapter has no more trainable parameters than with the given config. Errors are those of `allocate`.
    """
    rows = first_rows(spec, loader)
    with working(f"allocating ranks from {format_count(len(rows), 'row')}"):
        found = allocate(model, config, rows, row_loss(spec), by=by, allow=_allow(spec))
    ranks = sorted(found.ranks.values())
    progress.say(
        f"Ranks allocated by {by} over {format_count(len(rows), 'row')}: {ranks[0]} to {ranks[-1]}, median "
        f"{ranks[len(ranks) // 2]}; {found.parameters:,} parameters in A and B (budget {found.budget:,}, "
        f"from r = {spec.settings.r})."
    )
    return found.config


def init_from_data(
    model: nn.Module, config: LoraConfig, spec: RunSpec, loader: BatchLoader, progress: Progress
) -> tuple[LoraConfig, core.Statistics | None]:
    """Return the adapter's config and, if the initialization needs them, statistics of the first training rows.

    The config has the computed ranks of EVA. The loader does not advance.

    Raises:
        UsageError: The initialization would change a quantized base.
        LorakitError: `lorakit.core.collect_for` failed; the error class and message say why.
    """
    init = init_named(config.init_lora_weights)
    if init.changes_base and spec.quantization is not None:
        raise UsageError(
            f"init_lora_weights={init.name!r} changes the base weights, but this base is quantized, so the changed "
            "weights would have to be requantized; omit --quantization or use another initialization.",
            what=init.name,
            field="init_lora_weights",
        )
    if not init.needs:
        return config, None
    rows = first_rows(spec, loader)
    keep = _positions_with_loss if init.name == "eva" else None
    with working(f"collecting statistics from {format_count(len(rows), 'row')} for {init.name}"):
        found = core.collect_for(model, config, rows, row_loss(spec), keep=keep, allow=_allow(spec))
    ranks = sorted(set(found.config.rank_pattern.values()) | {found.config.r})
    spread = f", ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ""
    progress.say(f"Adapter initialized by {init.name} from {format_count(len(rows), 'row')}{spread}.")
    return found.config, found


def first_rows(spec: RunSpec, loader: BatchLoader) -> list[Batch]:
    """Return the first training rows with loss, one per batch, in the order of the run's first epoch."""
    collate, pad, seed = spec.task.objective.collate, loader.pad_id, spec.settings.seed
    weights = loader.weights if isinstance(loader, Loader) else ()
    singles = Loader(loader.sequences, 1, seed, epochs=1, pad_id=pad, weights=weights, collate=collate)
    return [batch for batch in islice(singles, ROWS) if batch.trained_tokens]


def quantized_run_base(model: nn.Module, spec: RunSpec, loader: BatchLoader, progress: Progress) -> RunInt8 | None:
    """Quantize the base of a run in place if it is to be multiplied in int8; see `quantized_base`."""
    if spec.base_matmul != "int8":
        return None
    batch_tokens = min(loader.batch_rows * spec.forecast.max_length, MOST_TOKENS)
    found, losses, device = calibration_rows(first_rows(spec, loader)), spec.task.objective.row_losses, spec.device
    by_row = None if losses is None else lambda model, batch: losses(model, batch, device)
    rows = CalibrationRows(found, loader.pad_id, batch_tokens, row_loss(spec), by_row)
    return quantized_base(model, spec, rows, progress)


def row_loss(spec: RunSpec) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a function that computes a model's mean loss on a batch, a scalar."""
    loss_sum = spec.task.objective.loss_sum

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        held = next(model.parameters())
        device, is_wide = held.device, held.device.type == "cpu" or held.dtype == torch.float32
        dtype = torch.float16 if held.dtype == torch.float16 else torch.bfloat16
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
