"""What the base's shape alone decides: whether targets match and how long a row may be. No weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit import hub, plan
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, UsageError
from lorakit.targets import unfitting_keys
from lorakit.train.defaults import DEFAULTS
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
        ConfigError: A key of `learning_rate_pattern` fits no adapted module.
        UsageError: `max_length` was given and the model cannot take it.
    """
    shape = hub.shape_of(source)
    config = settings.lora_config()
    counted = plan.count(shape, config, allow_partial=settings.allow_partial_targets)
    wrong = unfitting_keys(
        "learning_rate_pattern", settings.learning_rate_pattern, [site.path for site in counted.sites]
    )
    if wrong:
        raise ConfigError(" ".join(wrong))
    length = row_length(shape, settings.max_length)
    notes = () if length == settings.max_length else (f"Rows have at most {length:,} tokens: the model takes no more.",)
    return Forecast(shape, config, length, notes)


def row_length(shape: plan.ModelShape, wanted: int) -> int:
    """The longest row that a model takes.

    Args:
        shape: The model.
        wanted: Tokens; the default gives way where the model takes fewer, anything else was asked for.

    Returns:
        `wanted`, or the model's positions.

    Raises:
        UsageError: More was asked for than the model takes.
    """
    if not 0 < shape.positions < wanted:
        return wanted
    if wanted != DEFAULTS["max_length"].value:
        raise UsageError(
            f"max_length is {wanted:,}, but {shape.name} takes at most {shape.positions:,} tokens; "
            f"give --max-length {shape.positions} or less."
        )
    return shape.positions
