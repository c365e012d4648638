"""Checks that run before a call changes a model: adapter names, overrides in `allow`, scales and compatibility."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.model.fingerprint import vocabulary_of
from lorakit.core.routing.state import AdapterState
from lorakit.core.shards import is_dtensor
from lorakit.core.variants import check_invocation, variants_of
from lorakit.errors import OVERRIDE, AdapterError, ConfigError, NotYetSupported, TargetError

ALLOWANCES = ("partial_targets", "base_mismatch", "key_mismatch", "nonfinite", "odd_scale", "recompute_init")
"""Names of the checks that a caller can override."""

LARGEST_USUAL_SCALE = 1000.0

WITH_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in transformers whose Mamba mixers pass weights to a fused kernel instead of calling the modules."""

READ_PAST = frozenset({"conv1d", "out_proj"})
"""Names of the modules that Mamba mixers do not call."""


def check_new_name(state: AdapterState | None, name: str) -> None:
    """Raise an AdapterError if an adapter name is in use, or if torch's module containers do not accept it."""
    if state is not None and name in state.configs:
        text = f"This model already has an adapter {name!r}. Detach it first, or choose another name."
        raise AdapterError(text, what=name)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,99}", name):
        raise AdapterError(
            f"{name!r} cannot be an adapter's name: use up to 100 letters, digits, underscores and hyphens, but no "
            "dots.",
            what=name,
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):  # including the attributes of nn.Module
        text = f"{name!r} cannot be an adapter's name: torch's module containers have an attribute of that name."
        raise AdapterError(text, what=name)


def check_called(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise a TargetError if a fused kernel reads the weight of a module to be adapted, so that LoRA has no effect."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    bad = sorted({path for path in paths if path.rpartition(".")[2] in READ_PAST}) if kind in WITH_MAMBA else []
    if bad:
        text = (
            f"Module {bad[0]!r} is incompatible with Mamba-based models (model_type={kind!r}): their fused kernels "
            f"read the weights of {' and '.join(sorted(READ_PAST))} directly, so an adapter on this module would have "
            "no effect. Remove the module from target_modules, or add it to exclude_modules."
        )
        raise TargetError(text, what=bad[0], field="target_modules")


def check_not_distributed(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise a NotYetSupported if a module, given with its path, holds one process's part of its weight."""
    for path, module in modules:
        tensors = (tensor for tensor in module._parameters.values() if tensor is not None)
        part = next((tensor for tensor in tensors if is_dtensor(tensor)), None)
        what = type(part).__name__ if part is not None else module.__dict__.get("_hf_tp_plan")
        if what is not None:
            text = (
                f"{path}: the weight is distributed over processes ({what}), and adapters on parts of weights are not "
                "supported. Load the model without `tp_plan` and `distributed_config`, and attach adapters before the "
                "model is sharded."
            )
            raise NotYetSupported(text, what=what, where=path, field="target_modules")


def check_allowances(allow: Collection[str]) -> None:
    """Raise a ConfigError, which lists the allowed names, if an entry in `allow` is not the name of a check."""
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown:
        text = f"allow contains {unknown[0]!r}; allowed entries: {', '.join(map(repr, ALLOWANCES))}."
        raise ConfigError(text, what=unknown[0], field="allow", allowed=ALLOWANCES)


def check_scales(scales: Sequence[tuple[str, float]], allow: Collection[str]) -> None:
    """Raise a ConfigError if a scale is not in the usual interval (0, 1000], unless "odd_scale" is allowed."""
    odd = [(path, value) for path, value in scales if not 0 < value <= LARGEST_USUAL_SCALE]
    if odd and "odd_scale" not in allow:
        path, value = odd[0]
        raise ConfigError(
            f"The scale at {path} is {value:g}; scales are normally above 0 and at most {LARGEST_USUAL_SCALE:g}.",
            advice=f"Check lora_alpha, r and the patterns, or {OVERRIDE}.",
            what=f"{value:g}",
            where=path,
            override="odd_scale",
        )


def check_acts(model: nn.Module, config: LoraConfig) -> None:
    """Raise a ConfigError if a token for which an adapter waits is not in the model's vocabulary."""
    if vocabulary := vocabulary_of(model):
        check_invocation(config, range(vocabulary), f"the model's vocabulary of {vocabulary:,}")


def check_company(state: AdapterState | None, config: LoraConfig) -> None:
    """Raise a ConfigError if two adapters would train the base's biases, or if a variant excludes others."""
    new = variants_of(config)
    for name, other in () if state is None else state.configs.items():
        if config.bias != "none" and other.bias != "none":
            text = (
                f"bias is {config.bias!r}, but adapter {name!r} already trains the base's biases, and only one adapter "
                "may do so. Set bias='none'."
            )
            raise ConfigError(text, what=name, field="bias", allowed=("none",))
        present = variants_of(other)
        for variant in (*new, *present):
            why = "" if variant.move is None else variant.move.excludes_others
            if why and (variant in new) != (variant in present):
                text = (
                    f"{variant.title} cannot be combined with adapters that don't use {variant.title}, and this model "
                    f"already has adapter {name!r}: {why}. Detach {name!r} first, or load the base "
                    "a second time."
                )
                raise ConfigError(text, what=name, field=variant.field)
