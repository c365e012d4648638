"""Checks of `LoraConfig`'s fields; each error names the field, its value and the allowed values.

Some messages start with PEFT's wording because programs match it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lorakit.config.nested import CordaConfig, EvaConfig, LoftQConfig
from lorakit.config.types import BIAS_CHOICES, PeftType, TaskType
from lorakit.errors import ConfigError, ConfigTypeError, nearest, warn_caller

if TYPE_CHECKING:
    from lorakit.config.lora import LoraConfig


def task(value: TaskType | str | None) -> TaskType | None:
    """Return the task type with this name.

    Raises:
        ConfigError: The task type is unknown.
    """
    if value is None:
        return None
    try:
        return TaskType(value)
    except ValueError:
        allowed = [word.value for word in TaskType]
        hint = nearest(str(value), allowed, 1)
        raise ConfigError(
            f"Invalid task type: {value!r}. Must be one of the following task types: {', '.join(allowed)}."
            + (f" Did you mean {hint[0]}?" if hint else ""),
            what=value,
            field="task_type",
            allowed=allowed,
        ) from None


def lora(value: PeftType | str | None) -> PeftType:
    """Return LORA for any value, as PEFT does, unless it names another method.

    Raises:
        ConfigError: The value names another method.
    """
    if value != PeftType.LORA.value and value in [method.value for method in PeftType]:
        raise ConfigError(
            f"peft_type is {value!r}; only LORA is supported.",
            what=value,
            field="peft_type",
            allowed=(PeftType.LORA.value,),
        )
    return PeftType.LORA


def names(field: str, value: Any) -> set[str] | str | None:
    """Return a list of names as a set, or a pattern unchanged.

    Raises:
        ConfigError: The value is neither, or an entry is empty or not a string.
    """
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(
            f"{field} is {value!r}; it must be a list of names or one non-empty pattern.", what=value, field=field
        )
    entries = list(value)
    bad = [entry for entry in entries if not isinstance(entry, str) or not entry]
    if bad:
        raise ConfigError(f"{field} holds {bad[0]!r}; each entry must be a non-empty name.", what=bad[0], field=field)
    return set(entries)


def plain_list(field: str, value: Any) -> list[str] | None:
    """Return a copy of a list of names.

    Raises:
        ConfigError: The value is a single string, or an entry is not a name.
    """
    if value is None:
        return None
    if isinstance(value, str):
        raise ConfigError(
            f"{field} is {value!r}; it must be a list of names, such as [{value!r}].", what=value, field=field
        )
    entries = list(value) if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)) else value
    names(field, entries)
    return list(entries)


def parameters(value: Any) -> list[str] | None:
    """Return a copy of a list of parameter names.

    Raises:
        ConfigTypeError: The value is a single string.
        ConfigError: An entry is not a name.
    """
    if isinstance(value, str):
        raise ConfigTypeError(
            f"`target_parameters` must be a list of strings or None. {value!r} was given.",
            what=value,
            field="target_parameters",
        )
    return plain_list("target_parameters", value)


def table(field: str, value: Any) -> dict[str, Any]:
    """Return a copy of a mapping from patterns to values.

    Raises:
        ConfigError: The value is not a mapping, or a key is not a pattern.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(
            f"{field} is {value!r}; it must be a mapping from name patterns to numbers.", what=value, field=field
        )
    bad = [key for key in value or {} if not isinstance(key, str) or not key]
    if bad:
        raise ConfigError(
            f"{field} holds the key {bad[0]!r}; each key must be a non-empty pattern.", what=bad[0], field=field
        )
    return dict(value or {})


def check_numbers(config: LoraConfig) -> None:
    """Check ranks, alphas and dropout.

    Raises:
        ConfigError: A value is not a number or is out of range.
    """
    _whole("r", config.r)
    _finite("lora_alpha", config.lora_alpha)
    _finite("lora_dropout", config.lora_dropout)
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(
            f"lora_dropout is {config.lora_dropout!r}; it must be in [0, 1).",
            what=config.lora_dropout,
            field="lora_dropout",
        )
    for key, rank in config.rank_pattern.items():
        _whole(f"rank_pattern[{key!r}]", rank)
    for key, alpha in config.alpha_pattern.items():
        _finite(f"alpha_pattern[{key!r}]", alpha)


def _whole(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{field} is {value!r}; it must be a whole number of at least 1.", what=value, field=field)


def _finite(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{field} is {value!r}; it must be a finite number.", what=value, field=field)


def check_words(config: LoraConfig) -> None:
    """Check fields with a fixed set of values.

    Raises:
        ConfigError: A value is not one of them.
    """
    if config.bias not in BIAS_CHOICES:
        raise ConfigError(
            f"bias is {config.bias!r}; it must be one of {', '.join(map(repr, BIAS_CHOICES))}.",
            what=config.bias,
            field="bias",
            allowed=BIAS_CHOICES,
        )
    if not isinstance(config.init_lora_weights, (bool, str)):
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights!r}; it must be True, False or a name.",
            what=config.init_lora_weights,
            field="init_lora_weights",
        )


def check_layers(config: LoraConfig) -> None:
    """Check that `layers_to_transform` and `layers_pattern` are used with a list of target modules.

    Raises:
        ConfigError: `target_modules` is a pattern, or `layers_pattern` is set without `layers_to_transform`.
    """
    if isinstance(config.target_modules, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(config, field) is not None:
                raise ConfigError(
                    f"`{field}` cannot be used when `target_modules` is a str. Give target_modules as a list.",
                    field=field,
                )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
            field="layers_pattern",
        )


def check_inits(config: LoraConfig) -> None:
    """Check that each init has its settings; warn about settings without their init, and ignore them.

    Raises:
        ConfigError: "loftq" without `loftq_config`.
        ConfigTypeError: `loftq_config` is neither a dict nor a `LoftQConfig`.
    """
    settings = config.loftq_config
    if settings is not None and not isinstance(settings, (dict, LoftQConfig)):
        raise ConfigTypeError(
            f"`loftq_config` must be a `LoftQConfig`, a dict, or None; {settings!r} was given.", field="loftq_config"
        )
    config.loftq_config = dict(vars(settings) if isinstance(settings, LoftQConfig) else settings or {})
    init = config.init_lora_weights
    if init == "loftq" and not config.loftq_config:
        raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.", field="loftq_config")
    if init != "loftq" and config.loftq_config:
        warn_caller("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
        config.loftq_config = {}
    for word, field, part in (("eva", "eva_config", EvaConfig), ("corda", "corda_config", CordaConfig)):
        shown = part.__name__.removesuffix("Config").replace("Eva", "EVA").replace("Corda", "CorDA")
        if init == word and getattr(config, field) is None:
            warn_caller(
                f"`init_lora_weights` is {word!r} but `{field}` is not specified. Using default {shown} config."
            )
            setattr(config, field, part())
        elif init != word and getattr(config, field) is not None:
            warn_caller(f"`{field}` specified but will be ignored when `init_lora_weights` is not {word!r}.")
    moves = str(init).startswith("pissa") or init in ("olora", "corda", "lora_ga")
    if moves and config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        warn_caller(
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified base "
            "weights: PEFT's `path_initial_model_for_weight_conversion` cannot be used with it. "
            "`lorakit.core.save_adapter` still writes plain LoRA."
        )


def check_together(config: LoraConfig) -> None:
    """Check fields that exclude each other.

    Raises:
        ConfigError: Two fields exclude each other.
    """
    if config.use_dora and config.megatron_config:
        raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.", field="use_dora")
    if config.lora_bias and config.init_lora_weights not in (True, False):
        raise ConfigError(
            "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
            f"init_lora_weights={config.init_lora_weights} instead.",
            what=config.init_lora_weights,
            field="lora_bias",
        )
    if config.lora_bias and config.use_dora:
        raise ConfigError(
            "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False.", field="lora_bias"
        )
    if config.alora_invocation_tokens is not None and config.task_type != TaskType.CAUSAL_LM:
        warn_caller("aLoRA is currently only supported for CAUSAL_LM task; it takes effect only in causal models.")
