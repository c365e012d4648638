"""What a run will cost, worked out before it starts: shape of the model, precision, plan.

Brings the settings, the hub's shape and calibration, and `lorakit.plan` together; computes no cost itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit import hub, plan
from lorakit.config import LoraConfig
from lorakit.errors import UsageError
from lorakit.train.settings import TrainSettings


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before its data has been counted.

    Attributes:
        shape: The base's shape.
        config: The adapter's config.
        max_length: Longest row in tokens: the setting, or what the model can take where the setting was left alone.
        notes: Sentences a person should read.
    """

    shape: plan.ModelShape
    config: LoraConfig
    max_length: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Precision:
    """In which precision the base is held, and how fast the machine is.

    Attributes:
        dtype: "bfloat16" or "float32".
        calibration: What was measured, or None where nothing had to be.
        lines: Sentences that say both.
    """

    dtype: str
    calibration: hub.Calibration | None
    lines: tuple[str, ...]


def forecast(settings: TrainSettings, source: hub.ModelSource) -> Forecast:
    """Read the model's shape and check targets and length against it; no weight is loaded.

    Args:
        settings: Adapter and length.
        source: The model.

    Returns:
        The forecast.

    Raises:
        ModelError: The model's config cannot be read.
        TargetError: A target matches nothing.
        UsageError: `max_length` was given and the model cannot take it.
    """
    shape = hub.shape_of(source)
    config = settings.lora_config()
    plan.count(shape, config, allow_partial=settings.allow_partial_targets)
    length, notes = settings.max_length, []
    if 0 < shape.positions < length:
        if "max_length" in settings.model_fields_set:
            raise UsageError(
                f"max_length is {length:,}, but {source.given} takes at most {shape.positions:,} tokens; "
                f"give --max-length {shape.positions} or less."
            )
        length = shape.positions
        notes.append(f"Rows have at most {length:,} tokens: the model takes no more.")
    return Forecast(shape, config, length, tuple(notes))


def precision(settings: TrainSettings, device: torch.device, recorded: str | None) -> Precision:
    """Decide the base's precision; "auto" measures the machine, a resumed run keeps what it had.

    Args:
        settings: `dtype` is read.
        device: What is measured.
        recorded: The precision of the run that is resumed, or None.

    Returns:
        The precision and the sentences that say why.
    """
    calibration = hub.calibrate(device)
    if recorded is not None:
        return Precision(recorded, calibration, (calibration.line(), f"{recorded}, as the run began."))
    choice = hub.choose_dtype(settings.dtype, calibration)
    return Precision(choice.dtype, calibration, (calibration.line(), choice.reason))
