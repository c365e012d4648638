"""The int8 matmuls of a run's base (`--base-matmul int8`): whether they can be used, calibration, check and record.

The base is quantized after the adapter was attached or loaded, so that data-dependent inits and the fingerprint of the
base see the original weights. The calibration rows are the first rows of the run's data order, the same in all
processes. The input scales are saved in the run directory, so that a resumed run has the same bits. They and the record
are also kept for later runs with the same start.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from lorakit import core, durable
from lorakit.caches import INT8
from lorakit.data import Batch
from lorakit.data.encoding import IGNORED
from lorakit.differences import mean_difference
from lorakit.errors import AdapterFileError, NotYetSupported, RunError, UsageError
from lorakit.report import INT8_FILE
from lorakit.session.base_matmul import unsupported
from lorakit.terminal import working
from lorakit.train.files.checkpoint import environment
from lorakit.train.loop.run import RunInt8
from lorakit.train.loop.score_cache import read_kept, start_key, write_kept

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.config import LoraConfig
    from lorakit.train.settings.settings import TrainSettings
    from lorakit.train.spec import RunSpec

CALIBRATION_TOKENS = 2048
"""Number of tokens from which on no further calibration row is used."""

MOST_TOKENS = 1024
"""Maximum number of tokens in a batch of several rows, with padding; more take more memory and hardly less time."""

ERRORS = 2
"""Number of standard errors by which the loss must exceed the bound."""

MOST_KEPT = 20
"""Maximum number of calibrations that are kept for later runs; the oldest are removed."""

LEAST_SECONDS = 1.0
"""Minimum processor time of a calibration that is kept; a shorter one is not worth a file."""

_Groups = Sequence[Sequence[int]]  # indices of the rows of each batch
_MAX_BYTES = 1 << 30


def chosen_matmul(
    settings: TrainSettings,
    device: torch.device,
    record: Mapping[str, Any] | None,
    config: LoraConfig,
    say: Callable[[str], None],
) -> str:
    """Return how the base of a run with int8 matmuls is multiplied: "int8", or "dtype" because of the machine.

    `record` has the contents of `run.json` if the run is resumed; `say` receives a message if the machine does not
    support int8 matmuls.

    Raises:
        RunError: The run began with int8 matmuls, and this machine does not support them.
        UsageError: The init or the variant of the adapter changes the weights of the base, which are quantized.
    """
    before = None if record is None else (record.get("resolved") or {}).get("base_matmul", "dtype")
    if before == "dtype":
        return "dtype"
    why = unsupported(device)
    if why and before == "int8":
        text = (
            f"cannot resume {settings.output_dir}: its base is multiplied in int8, but {why}; resume it on the machine "
            "that started it, or start a new run."
        )
        raise RunError(text, what="int8", where=settings.output_dir, field="base_matmul")
    if why:
        say(f"Base matmuls: in the dtype of the base, not in int8, because {why}.")
        return "dtype"
    init, variant = core.init_named(config.init_lora_weights), core.moving_variant(config)
    if init.changes_base or variant is not None:
        name, what = (f"init_lora_weights={init.name!r}", init.name) if variant is None else (variant.title,) * 2
        text = (
            f"{name} changes the base weights, which cannot be combined with base_matmul int8, because they are "
            "quantized; omit one of them."
        )
        raise UsageError(text, what=what, field="base_matmul")
    return "int8"


def calibration_rows(rows: Sequence[Batch]) -> list[Batch]:
    """Return the first of these batches of one row with at least `CALIBRATION_TOKENS` tokens together, or all."""
    ends = accumulate(row.tokens for row in rows)
    return [row for row, end in zip(rows, ends, strict=True) if end - row.tokens < CALIBRATION_TOKENS]


def quantized_base(model: nn.Module, spec: RunSpec, rows: CalibrationRows) -> RunInt8:
    """Quantize the base of an adapted model; a resumed run uses the input scales in its directory."""
    core.record_original_base(model)
    recorded = (spec.record or {}).get("int8")
    if recorded:
        base = _with_scales(model, spec, recorded, _scales_of_run(spec.folder, recorded))
    else:
        with working("calibrating int8 matmuls"):
            base = _kept_or_calibrated(model, spec, rows)
    for line in base.lines():
        spec.progress.say(line)
    for path, ratio in base.record["worst"].items():
        spec.progress.detail(f"int8: largest input channel of {path}: {ratio:,.0f} times the median channel")
    return base


def _with_scales(model: nn.Module, spec: RunSpec, record: Mapping[str, Any], scales: bytes) -> RunInt8:
    originals = core.quantize_with_scales(model, tensors_from_bytes(scales), keep=spec.settings.keep_bf16_base)
    return RunInt8(dict(record), scales, originals)


def _scales_of_run(folder: Path, recorded: Mapping[str, Any]) -> bytes:
    """Return the contents of the file with the scales in a run directory, after a check of its hash."""
    path = folder / INT8_FILE
    advice = "restore it, or start a new run in another --output-dir"
    try:
        data = durable.read_bytes(path, _MAX_BYTES)
    except AdapterFileError as cause:
        raise RunError(f"cannot resume {folder}: {cause} {advice}.", where=path, field="base_matmul") from cause
    digest = durable.sha256_bytes(data)
    if digest != recorded.get("scales_sha256"):
        text = f"cannot resume {folder}: {path} was changed (its SHA-256 differs from that in run.json); {advice}."
        raise RunError(text, what=digest, where=path, field="base_matmul")
    return data


def _kept_or_calibrated(model: nn.Module, spec: RunSpec, rows: CalibrationRows) -> RunInt8:
    """Quantize the base with the scales of an earlier run with the same start, or calibrate it and keep the scales."""
    key, began = _cache_key(model, spec, rows), time.process_time()
    kept = None if key is None else calibration_kept(key)
    if kept is not None:
        record = {**kept[0], "loss_bound": spec.settings.int8_loss_bound}
        _check_loss(record)
        spec.progress.say("The int8 calibration was read from the cache: an earlier run had the same start.")
        return _with_scales(model, spec, record, kept[1])
    base = _calibrated(model, spec, rows)
    if key is not None and time.process_time() - began >= LEAST_SECONDS:
        problem = keep_calibration(key, base.record, base.scales)
        if problem:
            spec.progress.detail(f"The int8 calibration is not kept for later runs: {problem}.")
    return base


def _cache_key(model: nn.Module, spec: RunSpec, rows: CalibrationRows) -> str | None:
    """Return the key of a calibration of a model that is not quantized yet, or None if it is not to be kept."""
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    facts = {"batch_tokens": rows.batch_tokens}  # sizes of batches change roundings
    here = environment(spec.device, ", ".join(dtypes), spec.quantization_values)
    return start_key(INT8, model, spec, here, facts, named, rows.rows)


def calibration_kept(key: str) -> tuple[dict[str, Any], bytes] | None:
    """Return the record and the input scales of the calibration that was kept under a key, or None."""
    values = read_kept(INT8, key) or {}
    try:
        record, scales = json.loads(values["record"]), base64.b64decode(values["scales"], validate=True)
    except (KeyError, TypeError, ValueError):
        return None
    return (record, scales) if record.get("scales_sha256") == durable.sha256_bytes(scales) else None


def keep_calibration(key: str, record: Mapping[str, Any], scales: bytes) -> str:
    """Keep the record and the input scales of a calibration; return why they could not be kept, or ""."""
    text = json.dumps(dict(record))  # a string keeps the order of the entries
    return write_kept(INT8, key, {"record": text, "scales": base64.b64encode(scales).decode()}, MOST_KEPT)


def _calibrated(model: nn.Module, spec: RunSpec, calibration: CalibrationRows) -> RunInt8:
    rows = calibration.rows
    base, losses, int8_losses = calibration.measured(model, spec.settings.keep_bf16_base)
    weights = [row.trained_tokens for row in rows]
    sums, int8_sums = (
        [mean * weight for mean, weight in zip(means, weights, strict=True)] for means in (losses, int8_losses)
    )
    scales = tensors_to_bytes({name: scale.contiguous() for name, scale in core.int8_scales(model).items()})
    record = {
        "layers": len(base.paths),
        "kept": base.kept,
        "smoothing": base.smoothing,
        "rows": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "rows_sha256": hashlib.sha256(b"".join(row.input_ids.numpy().tobytes() for row in rows)).hexdigest(),
        "loss": sum(sums) / sum(weights),
        "int8_loss": sum(int8_sums) / sum(weights),
        "loss_error": mean_difference(int8_sums, sums, weights).error,
        "loss_bound": spec.settings.int8_loss_bound,
        "scales_sha256": durable.sha256_bytes(scales),
        "bytes_before": base.bytes_before,
        "bytes_after": base.bytes_after,
        "worst": dict(base.worst),
    }
    _check_loss(record)
    return RunInt8(record, scales, base.originals)


def _check_loss(record: Mapping[str, Any]) -> None:
    """Check the loss on the calibration rows: its rise must not be NaN, or exceed the bound by two standard errors."""
    rise, error, bound = record["int8_loss"] - record["loss"], record["loss_error"], record["loss_bound"]
    if rise - ERRORS * error <= bound:
        return
    site, ratio = next(iter(record["worst"].items()))
    text = (
        f"int8 matmuls raise the loss on the {record['tokens']:,} calibration tokens from {record['loss']:.4f} to "
        f"{record['int8_loss']:.4f} ({rise:+.4f} ± {error:.4f} nats per token; bound {bound:g}). The largest outliers "
        f"are in {site} ({ratio:,.0f} times the median channel). Omit --base-matmul int8, or pass --int8-loss-bound "
        f"with a value above {rise:.4f} to train nevertheless."
    )
    raise RunError(text, what=rise, where=site, field="int8_loss_bound")


@dataclass(frozen=True)
class CalibrationRows:
    """The calibration rows of a run, and how their losses are computed.

    A forward pass of several rows takes little longer than one of a short row, so rows of similar lengths are padded to
    one batch, in which each row has its own loss. If a model or a task does not support that, rows are run alone.

    Attributes:
        rows: Batches of one row, in the run's data order.
        batch_tokens: Maximum number of tokens in a batch of several rows, including padding.
        loss: Function of the model and a batch of one row that returns the mean loss, a scalar.
        row_losses: Function of the model and a batch of several rows that returns the summed loss of each row (rows,),
            or None. It raises NotYetSupported if it cannot do so for the model.
    """

    rows: Sequence[Batch]
    pad_id: int
    batch_tokens: int
    loss: Callable[[nn.Module, Batch], Tensor]
    row_losses: Callable[[nn.Module, Batch], Tensor] | None = None

    def measured(self, model: nn.Module, keep: bool) -> tuple[core.Int8Base, list[float], list[float]]:
        """Quantize the base of a model; return it, and the mean loss of each row before and after."""
        alone = [[number] for number in range(len(self.rows))]
        grouped = alone if self.row_losses is None else by_length(self.rows, self.batch_tokens)
        groupings = [grouped, alone] if len(grouped) < len(alone) else [alone]
        (base, before), left = _first_possible(groupings, lambda groups: self._quantized(groups, model, keep))
        after, _ = _first_possible(left, lambda groups: self.losses(groups, model))
        return base, before, after

    def _quantized(self, groups: _Groups, model: nn.Module, keep: bool) -> tuple[core.Int8Base, list[float]]:
        inputs, forward = self._inputs(groups)
        is_padded = len(groups) < len(self.rows)
        base = core.quantize_base(model, inputs, keep=keep, forward=forward, needs_mask=is_padded)
        return base, _in_order(groups, base.losses)

    def losses(self, groups: _Groups, model: nn.Module) -> list[float]:
        """Return the mean loss of each row, in their order, on the base without adapters, with these batches."""
        inputs, forward = self._inputs(groups)
        return _in_order(groups, core.base_losses(model, inputs, forward))

    def _inputs(self, groups: _Groups) -> tuple[list[dict[str, Tensor]], Callable[..., Tensor]]:
        """Return the model's inputs of each batch, and the function that runs the model on them."""
        rows, batches, inputs = self.rows, dict[int, tuple[Sequence[int], Batch]](), list[dict[str, Tensor]]()
        for group in groups:
            batch = rows[group[0]] if len(group) == 1 else together([rows[number] for number in group], self.pad_id)
            inputs.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
            batches[id(inputs[-1])] = group, batch

        def forward(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
            group, batch = batches[id(given)]
            if self.row_losses is None or len(group) == 1:
                return self.loss(model, batch)
            sums = self.row_losses(model, batch)
            return sums / torch.tensor([rows[number].trained_tokens for number in group], device=sums.device)

        return inputs, forward


def _in_order(groups: _Groups, losses: Sequence[float]) -> list[float]:
    numbered = zip((number for group in groups for number in group), losses, strict=True)
    return [loss for _, loss in sorted(numbered)]


def _first_possible(groupings: Sequence[_Groups], run: Callable[[_Groups], Any]) -> tuple[Any, Sequence[_Groups]]:
    """Return the result for the first grouping that the model supports, and this grouping with those after it."""
    for number, groups in enumerate(groupings[:-1]):
        try:
            return run(groups), groupings[number:]
        except NotYetSupported:
            continue
    return run(groupings[-1]), groupings[-1:]


def by_length(rows: Sequence[Batch], most: int) -> list[list[int]]:
    """Divide batches of one row into groups of similar lengths, as their indices, shortest first.

    A group of several rows has at most `most` tokens, including padding.
    """
    groups = list[list[int]]()
    for number in sorted(range(len(rows)), key=lambda one: rows[one].input_ids.numel()):
        if groups and (len(groups[-1]) + 1) * rows[number].input_ids.numel() <= most:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def together(rows: Sequence[Batch], pad_id: int) -> Batch:
    """Combine batches of one row, whose labels have the shape of their ids, into one, padded on the right."""
    values = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    ids, mask, labels = (
        nn.utils.rnn.pad_sequence([getattr(row, name)[0] for row in rows], batch_first=True, padding_value=value)
        for name, value in values.items()
    )
    tokens, trained_tokens = sum(row.tokens for row in rows), sum(row.trained_tokens for row in rows)
    return Batch(ids, mask, labels, rows[-1].epoch, tokens, trained_tokens)
