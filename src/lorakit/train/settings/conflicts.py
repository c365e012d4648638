"""Checks of settings that exclude each other, whatever the data, the model and the machine are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.train.settings.settings import TrainSettings


def check_rates(settings: TrainSettings) -> None:
    """Check that the settings of the optimizer and of the schedule fit each other.

    Args:
        settings: The settings of a run.

    Raises:
        ConfigError: Two settings exclude each other; the error names one of them.
    """
    if settings.optimizer == "lorafa" and settings.loraplus_lr_ratio is not None:
        raise ConfigError(
            "loraplus_lr_ratio cannot be combined with optimizer lorafa, which freezes A, so there is no ratio of "
            "learning rates; omit one of them.",
            field="loraplus_lr_ratio",
        )
    if settings.warmup_steps is not None and settings.warmup_ratio is not None:
        raise ConfigError(
            "warmup_steps and warmup_ratio both set the length of the warm-up; omit one of them.",
            field="warmup_steps",
        )
    if settings.decay_ratio is not None and settings.lr_scheduler_type != "wsd":
        raise ConfigError(
            f"decay_ratio applies only to lr_scheduler_type wsd, but lr_scheduler_type is "
            f"{settings.lr_scheduler_type}; omit decay_ratio, or use wsd.",
            field="decay_ratio",
        )


def check_base_matmul(settings: TrainSettings) -> None:
    """Check that the settings of the base's matmuls fit the others.

    Args:
        settings: The settings of a run.

    Raises:
        ConfigError: Two settings exclude each other; the error names one of them.
    """
    if settings.base_matmul == "dtype" and settings.keep_bf16_base:
        raise ConfigError(
            "keep_bf16_base applies only to base_matmul int8; omit it, or pass --base-matmul int8.",
            field="keep_bf16_base",
        )
    if settings.base_matmul == "int8" and settings.quantization is not None:
        raise ConfigError(
            f"base_matmul int8 cannot be combined with quantization {settings.quantization}, because both store the "
            "base's weights; omit one of them.",
            what=settings.quantization,
            field="base_matmul",
        )
