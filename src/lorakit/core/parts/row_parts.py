"""Trained rows of tables, built off a model and put in place: fresh ones, and those of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.layering.sitemap import SiteMap
from lorakit.core.parts.token_rows import ChosenRows, NewRows, TokenRows
from lorakit.core.routes.routing import AdapterState


def new_rows(
    site_map: SiteMap, chosen: Sequence[ChosenRows], given: Mapping[str, Tensor] | None = None, trainable: bool = True
) -> list[NewRows]:
    """Make an adapter's rows: as the base has them, so that a fresh adapter changes nothing, or as they are given.

    Args:
        site_map: The model's map.
        chosen: Which.
        given: Path of a table -> its rows, (n, d); None for fresh ones.
        trainable: They require gradients.

    Returns:
        The rows, on their table's device, in fp32 or wider.
    """
    made = []
    for part in chosen:
        standing = site_map.modules[part.path]
        if isinstance(standing, TokenRows):
            table = standing.token_adapter.original()
        else:
            table = site_map.base(part.path).weight  # type: ignore[assignment]
        if given is None:
            rows = table.detach()[torch.tensor(part.indices, device=table.device)]
        else:
            rows = given[part.path].to(table.device)
        wide = torch.promote_types(table.dtype, torch.float32)
        made.append(NewRows(part, nn.Parameter(rows.to(wide, copy=True), trainable)))
    return made


def put_rows(site_map: SiteMap, name: str, parts: Sequence[NewRows], state: AdapterState) -> None:
    """Put an adapter's rows in place; nothing here can refuse.

    Args:
        site_map: The model's map.
        name: The adapter.
        parts: Its rows.
        state: The model's state.
    """
    for part in parts:
        leader = _standing(site_map, part.chosen.path, state, None)
        for path in part.chosen.tied:
            _standing(site_map, path, state, leader)
        leader.put(name, part.chosen.indices, part.rows)


def _standing(site_map: SiteMap, path: str, state: AdapterState, leader: TokenRows | None) -> TokenRows:
    standing = site_map.modules[path]
    if not isinstance(standing, TokenRows):
        made = TokenRows(standing, state, leader)
        site_map.replace(standing, made)
        site_map.modules[path] = standing = made
    return standing
