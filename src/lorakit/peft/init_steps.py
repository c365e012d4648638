"""Where PEFT's two-step inits meet: what `preprocess_corda` and `preprocess_loraga` left on a model is taken."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.bases import at_least_fp32, base_of
from lorakit.core.data.inits import reduced
from lorakit.core.data.moments import GradientStatistics
from lorakit.core.layering.sitemap import survey
from lorakit.core.making.attaching import with_targets
from lorakit.errors import ConfigError, warn_caller
from lorakit.targets import resolve

EIGENS, GRADIENT = "eigens", "_peft_loraga_grad"
"""Attributes under which PEFT's functions leave what they found on a module."""


def for_attaching(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, core.Statistics | None]:
    """What `core.attach` needs for a config: PEFT's two-step inits leave their findings on the model, which are taken.

    "eva" begins as True does and is made what it is by `initialize_lora_eva_weights`.

    Args:
        model: The base.
        config: As it was given.

    Returns:
        The config to attach, and the statistics, or None.

    Raises:
        ConfigError: The first step was left out.
    """
    init = config.init_lora_weights
    if init == "eva":
        return config.with_fields(init_lora_weights=True, eva_config=None), None
    if init not in ("corda", "lora_ga"):
        return config, None
    word, function = (EIGENS, "preprocess_corda") if init == "corda" else (GRADIENT, "preprocess_loraga")
    found = {path: vars(module).pop(word) for path, module in model.named_modules() if word in vars(module)}
    if not found:
        raise ConfigError(
            f"`{word}` attribute not found for layer, please run `{function}` first: init_lora_weights={init!r} begins "
            "at what the data show."
        )
    if init == "corda":
        sites = {path: {"U": e.U_WC, "S": e.S_WC, "Vh": e.V_WC.T} for path, e in found.items()}
        return config, core.Statistics(config, sites)
    if config.lora_ga_config is None:
        raise ConfigError("lora_ga_config must be provided when init_lora_weights='lora_ga'.")
    gradients = {path: _gradient(model.get_submodule(path), gradient) for path, gradient in found.items()}
    statistics = reduced(model, config, gradients, ("partial_targets",))
    named = [
        match.path
        for match in resolve(survey(model).candidates, with_targets(config, model), allow_partial=True).matches
    ]
    without = [path for path in named if path not in statistics.sites]
    if without:
        warn_caller(
            f"LoRA-GA has no gradient for {', '.join(without)}; they begin as with init_lora_weights=True. "
            "preprocess_loraga takes those of dense layers that the loss depends on."
        )
    return config, dataclasses.replace(statistics, others_usual=True)


def _gradient(module: nn.Module, gradient: Tensor) -> GradientStatistics:
    found = GradientStatistics()
    found.add(at_least_fp32(gradient.T if base_of(module).transposed else gradient))
    found.batches = 1
    return found
