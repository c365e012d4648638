"""What a fresh adapter trains beside its factors, built off the model: copies, rows, biases, and their ties."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.layering.sitemap import SiteMap
from lorakit.core.parts.extras import Extras, build_extras
from lorakit.core.parts.row_choice import chosen_rows
from lorakit.core.parts.row_parts import new_rows
from lorakit.core.parts.ties import Ties, tie_copies


def fresh_extras(model: nn.Module, site_map: SiteMap, config: LoraConfig, outer: Collection[str], ties: Ties) -> Extras:
    """Make a fresh adapter's extras.

    Args:
        model: The model.
        site_map: Its map.
        config: The config.
        outer: Paths of the modules that get factors.
        ties: What the config names, and what is tied to it.

    Raises:
        TargetError: Another part of an adapter is in the way.
        ConfigError: Rows are named that cannot be trained.
    """
    saved = ties.found.saved
    rows = new_rows(site_map, chosen_rows(model, site_map, config, outer, saved))
    extras = build_extras(site_map.modules, outer, saved, config.bias)
    tie_copies(extras.copies, ties.leaders)
    return dataclasses.replace(extras, rows=tuple(rows), leaders=ties.leaders)
