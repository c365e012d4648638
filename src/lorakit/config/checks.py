"""Checks for the fields of `LoraConfig`; each error gives the field, its value and the allowed values.

Some messages start with PEFT's wording, because programs match on that wording.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.choices import BIASES
from lorakit.config.nested import CordaConfig, EvaConfig, LoftQConfig
from lorakit.config.types import PeftType, TaskType, Value
from lorakit.errors import ConfigError, ConfigTypeError, NotYetSupported, UsageError, did_you_mean, warn_caller

if TYPE_CHECKING:
    from lorakit.config.lora import LoraConfig

Number = TypeVar("Number", int, float)


def checked_class(instance: object) -> type:
    """Return an object's class, except to the constructor of a TRL trainer that uses another peft: it gets a
    UsageError.

    `isinstance` asks an object for `__class__` if the object is not an instance, so this is where a trainer that does
    not know the object is noticed; it would fail later, with a message that does not name the cause.
    """
    frame = sys._getframe(2)
    if frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("accelerate."):
        frame = frame.f_back  # accelerate's `is_peft_model`
    is_trainer = frame.f_code.co_name == "__init__" and frame.f_globals.get("__name__", "").startswith("trl.")
    if is_trainer and getattr(sys.modules.get("peft"), "__name__", "") != "lorakit.peft":
        kind, trainer = type(instance).__name__, type(frame.f_locals.get("self")).__name__
        text = f"{trainer} does not know lorakit.peft's {kind}; call lorakit.install_as_peft() before importing trl."
        raise UsageError(text, what=kind, field="peft_config")
    return type(instance)


def task(value: TaskType | str | None) -> TaskType | None:
    """Return the task type with the given name, None for None; a ConfigError suggests the most similar name."""
    try:
        return None if value is None else TaskType(value)
    except ValueError:
        allowed = [word.value for word in TaskType]
        text = f"Invalid task type: {value!r}. Must be one of the following task types: {', '.join(allowed)}."
        meant = did_you_mean(str(value), allowed)
        raise ConfigError(text + meant, what=value, field="task_type", allowed=allowed) from None


def lora(value: Value) -> PeftType:
    """Return `PeftType.LORA`, as PEFT does; a ConfigError for a value that names another method."""
    if value != PeftType.LORA and value in list(PeftType):
        text = f"peft_type is {value!r}; only LORA is supported."
        raise ConfigError(text, what=value, field="peft_type", allowed=(PeftType.LORA.value,))
    return PeftType.LORA


def names(field: str, value: Value) -> set[str] | str | None:
    """Return a list of names as a set; a pattern or None is returned unchanged, and anything else is a ConfigError."""
    if value is None or (isinstance(value, str) and value):
        return value
    return set(_entries(field, value, "a list of names or one non-empty pattern"))


def plain_list(field: str, value: Value) -> list[str] | None:
    """Return a copy of a list of names, or None; anything else is a ConfigError."""
    return None if value is None else _entries(field, value, f"a list of names, such as [{value!r}]")


def _entries(field: str, value: Value, rule: str) -> list[str]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError.of(field, value, rule)
    entries = []
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(f"{field} contains {entry!r}; entries must be non-empty names.", what=entry, field=field)
        entries.append(entry)
    return entries


def parameters(value: Value) -> list[str] | None:
    """Return a copy of a list of parameter names; a ConfigTypeError for a single string."""
    if isinstance(value, str):
        text = f"`target_parameters` must be a list of strings or None. {value!r} was given."
        raise ConfigTypeError(text, what=value, field="target_parameters")
    return plain_list("target_parameters", value)


def table(field: str, value: Mapping[str, Number] | None) -> dict[str, Number]:
    """Return a copy of a mapping from patterns to numbers; a ConfigError for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError.of(field, value, "a mapping from name patterns to numbers")
    for key in value or {}:
        if not isinstance(key, str) or not key:
            raise ConfigError(
                f"{field} contains the key {key!r}; each key must be a non-empty pattern.", what=key, field=field
            )
    return dict(value or {})


def init(value: bool | str | None) -> bool | str:
    """Return an init; None becomes False, because PEFT does not initialize A and B then, so that both are random."""
    return False if value is None else value


def check_values(config: LoraConfig) -> None:
    """Raise a ConfigError if a rank, alpha or dropout is out of range, or a field has none of its allowed values."""
    for field, rank in {"r": config.r, **_by_key("rank_pattern", config.rank_pattern)}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError.of(field, rank, "an integer >= 1")
    single = {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    for field, number in {**single, **_by_key("alpha_pattern", config.alpha_pattern)}.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ConfigError.of(field, number, "a finite number")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError.of("lora_dropout", config.lora_dropout, "in [0, 1)")
    if config.qalora_group_size < 1:
        raise ConfigError.of("qalora_group_size", config.qalora_group_size, "an integer >= 1")
    if config.bias not in BIASES:
        raise ConfigError.of("bias", config.bias, f"one of {str(BIASES)[1:-1]}", allowed=BIASES)
    if not isinstance(config.init_lora_weights, (bool, str)):
        raise ConfigError.of("init_lora_weights", config.init_lora_weights, "True, False or a name")


def _by_key(field: str, pattern: Mapping[str, float]) -> dict[str, float]:
    return {f"{field}[{key!r}]": value for key, value in pattern.items()}


def check_inits(config: LoraConfig) -> None:
    """Check that the init has the settings that it needs, and warn about settings for other inits, which are ignored.

    A ConfigError if "loftq" has no `loftq_config`, a ConfigTypeError if that is neither a dict nor a `LoftQConfig`.
    """
    settings = config.loftq_config
    if settings is not None and not isinstance(settings, (dict, LoftQConfig)):
        raise ConfigTypeError.of("loftq_config", settings, "a `LoftQConfig`, a dict, or None")
    config.loftq_config = dict(vars(settings) if isinstance(settings, LoftQConfig) else settings or {})
    init = config.init_lora_weights
    if init == "loftq" and not config.loftq_config:
        raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.", field="loftq_config")
    if init != "loftq" and config.loftq_config:
        warn_caller("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
        config.loftq_config = {}
    for word, shown, part in (("eva", "EVA", EvaConfig), ("corda", "CorDA", CordaConfig)):
        field = f"{word}_config"
        if init == word and getattr(config, field) is None:
            text = f"`init_lora_weights` is {word!r} but `{field}` is not specified"
            warn_caller(f"{text}. Using default {shown} config.")
            setattr(config, field, part())
        elif init != word and getattr(config, field) is not None:
            warn_caller(f"`{field}` specified but will be ignored when `init_lora_weights` is not {word!r}.")
    moves = str(init).startswith("pissa") or init in ("olora", "corda", "lora_ga")
    if moves and config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        warn_caller(
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified base "
            "weights: this combination excludes PEFT's `path_initial_model_for_weight_conversion`."
        )


def check_together(config: LoraConfig) -> None:
    """Raise a ConfigError if a field is set without another that it requires, or together with one that it excludes."""
    of_layers = [name for name in ("layers_to_transform", "layers_pattern") if getattr(config, name) is not None]
    if isinstance(config.target_modules, str) and of_layers:
        text = f"`{of_layers[0]}` cannot be used when `target_modules` is a str. Pass target_modules as a list."
        raise ConfigError(text, field=of_layers[0])
    if config.layers_pattern and config.layers_to_transform is None:
        text = "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
        raise ConfigError(text, field="layers_pattern")
    if config.use_dora and config.megatron_config:
        raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.", field="use_dora")
    if config.lora_bias and config.init_lora_weights not in (True, False):
        text = "The argument lora_bias=True is only supported with init_lora_weights=True or False, got"
        init = config.init_lora_weights
        raise ConfigError(f"{text} init_lora_weights={init} instead.", what=init, field="lora_bias")
    if config.lora_bias and config.use_dora:
        text = "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False."
        raise ConfigError(text, field="lora_bias")
    if config.alora_invocation_tokens is not None and config.task_type != TaskType.CAUSAL_LM:
        warn_caller("aLoRA is currently only supported for CAUSAL_LM task; it takes effect only in causal models.")


NOT_BUILT: Mapping[str, Any] = {"megatron_config": None}
"""Dict from each unsupported field to the value that turns the field off."""

ARITHMETIC = ("use_", "init_", "lora_", "target_", "rank_", "alpha_", "scal")
"""Name prefixes of unknown fields that probably change the computation."""


def check_built(config: LoraConfig) -> None:
    """Raise NotYetSupported for a config with unsupported features or unknown fields that seem to change the
    computation.

    An unknown field is harmless if its value is null, false, zero or empty. Otherwise it probably changes the
    computation if its name ends in "_config" or starts with a prefix in `ARITHMETIC`. `read_config` reports other
    unknown fields.
    """
    for name, neutral in NOT_BUILT.items():
        value = getattr(config, name)
        if value is not None and value != neutral:
            raise NotYetSupported(f"{name} is {value!r}, which is not supported yet; use {neutral!r}.", field=name)
    for name, value in config.unknown.items():
        if value and (name.endswith("_config") or name.startswith(ARITHMETIC)):
            text = f"{name} is {value!r}: this field of another PEFT version seems to change the computation. Remove it"
            raise NotYetSupported(f"{text} from the config if it does not.", field=name)
