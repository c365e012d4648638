"""PEFT's rule for several adapters with `target_parameters`: on one module they name the same ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.layering.parameter_sites import bare_parameters
from lorakit.core.layering.sitemap import survey
from lorakit.errors import ConfigError
from lorakit.targets import targeted_parameters


def check_parameters(model: nn.Module, configs: Mapping[str, LoraConfig], config: LoraConfig) -> None:
    """Refuse an adapter that names other parameters of a module than one that is there.

    Tensors carry the names of modules and not of parameters, and the names in memory here are those on disk, as in
    PEFT. The core itself (`lorakit.core.attach`) can have both.

    Args:
        model: The user's model.
        configs: The adapters on it.
        config: The one that comes.

    Raises:
        ConfigError: The message names both sets.
    """
    mine = set(config.target_parameters or ())
    others = {name: set(other.target_parameters or ()) for name, other in configs.items()}
    others = {name: theirs for name, theirs in others.items() if theirs and theirs != mine}
    if not mine or not others:
        return
    found = _by_module(model, config)
    for name, theirs in others.items():
        there = _by_module(model, configs[name])
        if any(found[module] != there[module] for module in found.keys() & there.keys()):
            raise ConfigError(
                "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                f"parameters, but got {sorted(mine)} for the new adapter and {sorted(theirs)} for adapter '{name}'."
            )


def _by_module(model: nn.Module, config: LoraConfig) -> dict[str, set[str]]:
    named: dict[str, set[str]] = {}
    for match in targeted_parameters(bare_parameters(survey(model), model), config):
        named.setdefault(match.path, set()).add(match.parameter)
    return named
