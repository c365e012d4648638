"""What the base's shape alone decides: whether targets match and how long a row may be. No weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakit import hub, plan
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, UsageError
from lorakit.targets import unfitting_keys
from lorakit.train.defaults import DEFAULTS
from lorakit.train.new_tokens import NewTokens, add_new_tokens
from lorakit.train.settings import TrainSettings


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before its data has been counted.

    Attributes:
        shape: The base's shape.
        config: The adapter's config.
        max_length: Longest row in tokens: the setting, or what the model can take where the setting was left alone.
        notes: Sentences a person should read.
        new_tokens: What is added to the vocabulary, or None.
    """

    shape: plan.ModelShape
    config: LoraConfig
    max_length: int
    notes: tuple[str, ...]
    new_tokens: NewTokens | None = None


def forecast(settings: TrainSettings, source: hub.ModelSource, tokenizer: Any) -> Forecast:
    """Read the model's shape and check targets and length against it; no weight is loaded.

    Args:
        settings: Adapter and length.
        source: The model.
        tokenizer: Its tokenizer, to which new tokens are added.

    Returns:
        The forecast.

    Raises:
        ModelError: The model's config cannot be read, or model or tokenizer cannot take new tokens.
        TargetError: A target matches nothing.
        ConfigError: A key of `learning_rate_pattern` fits no adapted module, or a new token is not new.
        UsageError: `max_length` was given and the model cannot take it.
    """
    shape = hub.shape_of(source)
    config, new = settings.lora_config(), None
    if settings.new_tokens:
        base = hub.skeleton(source)
        new = add_new_tokens(tokenizer, settings.new_tokens, base)
        config = new.config(config, base)
    counted = plan.count(shape, config, allow_partial=settings.allow_partial_targets)
    wrong = unfitting_keys(
        "learning_rate_pattern", settings.learning_rate_pattern, [*(site.path for site in counted.sites), *counted.rows]
    )
    if wrong:
        raise ConfigError(" ".join(wrong))
    length = row_length(shape, settings.max_length)
    notes = () if length == settings.max_length else (f"Rows have at most {length:,} tokens: the model takes no more.",)
    return Forecast(shape, config, length, notes, new)


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
