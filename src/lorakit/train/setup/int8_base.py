"""The int8 matmuls of a run's base (`--base-matmul int8`): whether they can be used, calibration, check and record.

The base is quantized after the adapter was attached or loaded, so that data-dependent inits and the fingerprint of the
base see the original weights. The calibration rows are the first rows of the run's data order. All processes use the
same rows. The input scales are saved in the run directory, so that a resumed run has the same bits.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import nn

from lorakit import core, durable
from lorakit.errors import AdapterFileError, RunError, UsageError
from lorakit.report import INT8_FILE
from lorakit.session.int8 import unsupported
from lorakit.tables import format_bytes, format_count
from lorakit.terminal import working
from lorakit.train.setup import int8_cache
from lorakit.train.setup.int8_rows import CalibrationRows, measured

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorakit.config import LoraConfig
    from lorakit.data import Batch
    from lorakit.train.loop.progress import Progress
    from lorakit.train.settings.settings import TrainSettings
    from lorakit.train.setup.run_spec import RunSpec

CALIBRATION_TOKENS = 2048
"""Number of tokens from which on no further calibration row is used."""

ERRORS = 2
"""Number of standard errors by which the loss must exceed the bound."""

NAME = "int8 (W8A8)"
"""Name of the matmuls in reports."""

_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class RunInt8:
    """The int8 base of a run.

    Attributes:
        record: Plain JSON values for `run.json` and `lorakit.json`: `layers`, `kept`, `smoothing`, `rows`, `tokens`,
            `rows_sha256`, `loss` and `int8_loss` on the calibration rows, `loss_error`, the standard error of their
            difference, `loss_bound`, `scales_sha256`, `bytes_before`
            and `bytes_after`, and `worst`, the sites with the largest outliers.
        scales: Contents of the file with the input scales.
        originals: Path -> original module, if they are kept.
    """

    record: Mapping[str, Any]
    scales: bytes = field(repr=False)
    originals: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def bytes_after(self) -> int:
        """Size of the base's weights in memory, in bytes."""
        return int(self.record["bytes_after"]) + sum(
            tensor.numel() * tensor.element_size()
            for module in self.originals.values()
            for name, tensor in module.named_parameters()
            if name != "bias"  # the int8 layer holds it too
        )

    def lines(self) -> list[str]:
        """Return a report in two lines: what is multiplied in int8, and the losses on the calibration rows."""
        values = self.record
        loss, in_int8 = values["loss"], values["int8_loss"]
        return [
            f"Base matmuls: {NAME} in {format_count(values['layers'], 'layer')}, calibrated on "
            f"{format_count(values['rows'], 'row')} ({values['tokens']:,} tokens); base "
            f"{format_bytes(values['bytes_before'])} → {format_bytes(values['bytes_after'])}.",
            f"Loss on the calibration rows: {loss:.4f} → {in_int8:.4f} in int8 ({in_int8 - loss:+.4f} ± "
            f"{values['loss_error']:.4f}; bound {values['loss_bound']:g}).",
        ]

    def write(self, folder: Path) -> None:
        """Write the input scales to the run directory.

        Args:
            folder: The run directory.

        Raises:
            DiskError: The file cannot be written.
        """
        durable.write_bytes(folder / INT8_FILE, self.scales)


def chosen_matmul(
    settings: TrainSettings, device: torch.device, record: Mapping[str, Any] | None, say: Callable[[str], None]
) -> str:
    """Return how the base of a run is multiplied: "int8", or "dtype" because of the settings or the machine.

    Args:
        settings: The run's settings.
        device: The run's device.
        record: Contents of `run.json` if the run is resumed, or None.
        say: Receives a message if the machine does not support int8 matmuls.

    Raises:
        RunError: The run began with int8 matmuls, and this machine does not support them.
    """
    if settings.base_matmul != "int8":
        return "dtype"
    before = None if record is None else (record.get("resolved") or {}).get("base_matmul", "dtype")
    if before == "dtype":
        return "dtype"
    why = unsupported(device)
    if not why:
        return "int8"
    if before == "int8":
        raise RunError(
            f"cannot resume {settings.output_dir}: its base is multiplied in int8, but {why}; resume it on the machine "
            "that started it, or start a new run.",
            what="int8",
            where=settings.output_dir,
            field="base_matmul",
        )
    say(f"Base matmuls: in the dtype of the base, not in int8, because {why}.")
    return "dtype"


def check_adapter(config: LoraConfig) -> None:
    """Check that an adapter leaves the weights of the base unchanged, because they are quantized.

    Args:
        config: The adapter's config.

    Raises:
        UsageError: Its init or its variant changes them.
    """
    init, variant = core.init_named(config.init_lora_weights), core.moving_variant(config)
    if not init.changes_base and variant is None:
        return
    name = f"init_lora_weights={init.name!r}" if variant is None else variant.title
    raise UsageError(
        f"{name} changes the base weights, which cannot be combined with base_matmul int8, because they are quantized; "
        "omit one of them.",
        what=init.name if variant is None else variant.title,
        field="base_matmul",
    )


def calibration_rows(rows: Sequence[Batch]) -> list[Batch]:
    """Return the first rows with at least `CALIBRATION_TOKENS` tokens together, or all of them.

    Args:
        rows: Batches of one row, in the run's data order.
    """
    found, tokens = list[Any](), 0
    for row in rows:
        if tokens >= CALIBRATION_TOKENS:
            break
        found.append(row)
        tokens += row.tokens
    return found


def quantized_base(model: nn.Module, spec: RunSpec, rows: CalibrationRows, progress: Progress) -> RunInt8:
    """Quantize the base of a run for int8 matmuls; a resumed run uses the input scales in its directory.

    Args:
        model: The model with its adapter, changed in place.
        spec: The run's specification.
        rows: The calibration rows, and how their losses are computed.
        progress: Receives the report.

    Returns:
        The record, and the scales to write.

    Raises:
        RunError: The loss rises above the bound, or the scales in the directory of a resumed run are damaged.
        LorakitError: The base cannot be quantized; the error class and message say why.
    """
    keep = spec.settings.keep_bf16_base
    core.record_original_base(model)
    recorded = (spec.record or {}).get("int8")
    if recorded:
        made = _requantized(model, spec.folder, recorded, keep)
    else:
        with working("calibrating int8 matmuls"):
            made = _kept_or_calibrated(model, spec, rows, progress)
    for line in made.lines():
        progress.say(line)
    for path, ratio in made.record["worst"].items():
        progress.detail(f"int8: largest input channel of {path}: {ratio:,.0f} times the median channel")
    return made


def _kept_or_calibrated(model: nn.Module, spec: RunSpec, rows: CalibrationRows, progress: Progress) -> RunInt8:
    """Quantize the base with the scales of an earlier run with the same start, or calibrate it and keep the scales."""
    key, began = int8_cache.key_of(model, spec, rows), time.process_time()
    kept = None if key is None else int8_cache.read(key)
    if kept is not None:
        record, scales = {**kept[0], "loss_bound": spec.settings.int8_loss_bound}, kept[1]
        _check_loss(record)
        progress.say("The int8 calibration was read from the cache: an earlier run had the same start.")
        keep = spec.settings.keep_bf16_base
        return RunInt8(record, scales, core.quantize_with_scales(model, tensors_from_bytes(scales), keep=keep))
    made = _calibrated(model, spec, rows)
    if key is not None and time.process_time() - began >= int8_cache.LEAST_SECONDS:
        problem = int8_cache.write(key, made.record, made.scales)
        if problem:
            progress.detail(f"The int8 calibration is not kept for later runs: {problem}.")
    return made


def _calibrated(model: nn.Module, spec: RunSpec, calibration: CalibrationRows) -> RunInt8:
    rows = calibration.rows
    base, losses, int8_losses = measured(calibration, model, spec.settings.keep_bf16_base)
    weights = [row.trained_tokens for row in rows]
    before, after = (_mean(found, weights) for found in (losses, int8_losses))
    scales = tensors_to_bytes({name: scale.contiguous() for name, scale in core.int8_scales(model).items()})
    record = {
        "layers": len(base.paths),
        "kept": base.kept,
        "smoothing": base.smoothing,
        "rows": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "rows_sha256": _digest(rows),
        "loss": before,
        "int8_loss": after,
        "loss_error": _paired_error(losses, int8_losses, weights),
        "loss_bound": spec.settings.int8_loss_bound,
        "scales_sha256": durable.sha256_bytes(scales),
        "bytes_before": base.bytes_before,
        "bytes_after": base.bytes_after,
        "worst": dict(base.worst),
    }
    _check_loss(record)
    return RunInt8(record, scales, base.originals)


def _check_loss(record: Mapping[str, Any]) -> None:
    """Check that the loss on the calibration rows has not risen by more than the bound; NaN is above any bound.

    There are few rows, so the rise must exceed the bound by two standard errors.
    """
    rise, error, bound = record["int8_loss"] - record["loss"], record["loss_error"], record["loss_bound"]
    if rise - ERRORS * error <= bound:
        return
    site, ratio = next(iter(record["worst"].items()))
    raise RunError(
        f"int8 matmuls raise the loss on the {record['tokens']:,} calibration tokens from {record['loss']:.4f} to "
        f"{record['int8_loss']:.4f} ({rise:+.4f} ± {error:.4f} nats per token; bound {bound:g}). The largest outliers "
        f"are in {site} ({ratio:,.0f} times the median channel). Omit --base-matmul int8, or pass --int8-loss-bound "
        f"with a value above {rise:.4f} to train nevertheless.",
        what=rise,
        where=site,
        field="int8_loss_bound",
    )


def _requantized(model: nn.Module, folder: Path, recorded: Mapping[str, Any], keep: bool) -> RunInt8:
    """Quantize the base with the scales that the run has saved."""
    path = folder / INT8_FILE
    advice = "restore it, or start a new run in another --output-dir"
    try:
        data = durable.read_bytes(path, _MAX_BYTES)
    except AdapterFileError as cause:
        raise RunError(f"cannot resume {folder}: {cause} {advice}.", where=path, field="base_matmul") from cause
    digest = durable.sha256_bytes(data)
    if digest != recorded.get("scales_sha256"):
        raise RunError(
            f"cannot resume {folder}: {path} was changed (its SHA-256 differs from that in run.json); {advice}.",
            what=digest,
            where=path,
            field="base_matmul",
        )
    return RunInt8(dict(recorded), data, core.quantize_with_scales(model, tensors_from_bytes(data), keep=keep))


def restore(model: nn.Module, int8: RunInt8) -> None:
    """Put the original modules of a base back, to evaluate the adapter on them.

    Args:
        model: The model with its adapter; changed in place.
        int8: The int8 base, with its originals.
    """
    paths, values = tuple(int8.originals), int8.record
    sizes = values["bytes_before"], values["bytes_after"]
    base = core.Int8Base(model, paths, {}, values["kept"], values["smoothing"], 0, (), {}, *sizes, dict(int8.originals))
    base.restore()


def _mean(losses: Sequence[float], weights: Sequence[int]) -> float:
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def _paired_error(before: Sequence[float], after: Sequence[float], weights: Sequence[int]) -> float:
    """Return the standard error of the difference of two mean losses, paired by row; 0 for a single row."""
    n, total = len(weights), sum(weights)
    mean = _mean(after, weights) - _mean(before, weights)
    squares = (((b - a - mean) * w) ** 2 for a, b, w in zip(before, after, weights, strict=True))
    return math.sqrt(sum(squares) * n / (n - 1)) / total if n > 1 else 0.0


def _digest(rows: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.input_ids.numpy().tobytes())
    return digest.hexdigest()
