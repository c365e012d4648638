"""Where an adapter sits, read from the names of its tensors instead of its config, as other formats' loaders need."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.layering.sitemap import survey
from lorakit.core.making.attaching import with_targets
from lorakit.errors import ConfigError, TargetError, warn_caller
from lorakit.targets import resolve

COMPILED = "_orig_mod."


def config_for_keys(model: nn.Module, config: LoraConfig, keys: Iterable[str]) -> LoraConfig:
    """A config that names exactly the modules that an adapter's tensors belong to.

    Args:
        model: The base.
        config: The config that came with them; what it would have named instead is warned about.
        keys: Names of tensors, such as "layers.0.q_proj.lora_A.weight".

    Raises:
        ConfigError: The config names bare parameters, whose tensors do not say which they are for.
    """
    if config.target_parameters:
        raise ConfigError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This is "
            "not supported: inject it without the state_dict."
        )
    paths = {key.removeprefix(COMPILED).rsplit(".lora_", 1)[0] for key in keys}
    candidates = survey(model).candidates
    here = {candidate.path for candidate in candidates} & paths
    try:
        named = {match.path for match in resolve(candidates, with_targets(config, model), allow_partial=True).matches}
    except (TargetError, ConfigError):
        named = set()
    said = []
    if named - here:
        said.append(f"The PEFT config contained these additional target modules: {sorted(named - here)}. ")
    if here - named:
        said.append(f"The state_dict contained these additional target modules: {sorted(here - named)}. ")
    if said:
        warn_caller(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            f"{''.join(said)}",
            RuntimeWarning,
        )
    exact = "|".join(re.escape(path) for path in sorted(here))
    return config.with_fields(
        target_modules=exact or None, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
