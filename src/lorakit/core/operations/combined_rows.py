"""Rows of tokens that several adapters train, combined as the rest of an adapter is: by what each changes in the base.

A trained row stands in place of the base's, so its effect is the difference between the two. It knows the base's rows
only through a function that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.files.keys import PREFIX, ROWS
from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.sitemap import survey
from lorakit.core.operations.loose import LooseAdapter
from lorakit.core.parts.token_rows import TokenRows
from lorakit.errors import AdapterError
from lorakit.targets.words import names_path

RowReading = Callable[[str, Sequence[int]], Tensor]
"""Path of a table and numbers of rows -> the base's rows there, (n, d), as they were before any merge."""


def check_same_rows(adapters: Sequence[LooseAdapter]) -> None:
    """Refuse adapters that train different rows.

    Raises:
        AdapterError: They do.
    """
    asked = {a.label: _asked(a.config) for a in adapters if a.config.trainable_token_indices}
    if any(one != next(iter(asked.values())) for one in asked.values()):
        raise AdapterError(
            f"{' and '.join(asked)} train different rows of tokens (trainable_token_indices), which are not combined. "
            "Train the same rows, or keep both active."
        )


def row_reader(model: nn.Module) -> RowReading:
    """How to read rows of a model's tables, with or without adapters.

    Args:
        model: Only read.
    """
    site_map = survey(model)

    def at(path: str, indices: Sequence[int]) -> Tensor:
        standing = site_map.modules.get(path)
        if standing is None:
            raise AdapterError(f"The model has no {path}, of which an adapter trains rows.")
        table: Any = site_map.base(path)._parameters["weight"]
        if isinstance(standing, TokenRows):
            table = standing.token_adapter.original()
        elif isinstance(standing, LoraLayer):
            table = standing.original()
        rows: Tensor = table.detach()[torch.tensor(list(indices), device=table.device)]
        return rows

    return at


def combined_rows(
    adapters: Sequence[LooseAdapter], weights: Sequence[float], reading: RowReading | None
) -> dict[str, Tensor]:
    """The rows of adapters that train the same ones.   [docs/math.md (59)]

    Args:
        adapters: Those that `check_same_rows` has passed, among others.
        weights: One number each.
        reading: The base's rows; not asked where the weights of an adapter's rows add up to 1.

    Returns:
        Name on disk -> what stands in the rows, (n, d); without those that one adapter alone has.

    Raises:
        AdapterError: The base's rows are needed, and there is no base.
    """
    found: dict[str, Tensor] = {}
    for name in sorted({name for adapter in adapters for name in adapter.others if name.endswith(ROWS)}):
        pairs = [(a, weight) for a, weight in zip(adapters, weights, strict=True) if name in a.others]
        if len(pairs) < 2:
            continue
        first = pairs[0][0]
        rows = torch.stack([adapter.others[name].double() * weight for adapter, weight in pairs]).sum(0)
        rest = 1.0 - sum(weight for _, weight in pairs)
        if rest:
            path = name.removeprefix(PREFIX).removesuffix(ROWS)
            if reading is None:
                raise AdapterError(
                    f"Rows of tokens at {path} are combined with weights that add up to {1 - rest:g}, so what they "
                    "change in the base counts. Give the base model too, or weights that add up to 1."
                )
            rows = rows + rest * reading(path, _indices(first.config, path)).to(rows)
        found[name] = rows.to(first.others[name].dtype)
    return found


def _indices(config: LoraConfig, path: str) -> list[int]:
    asked = config.trainable_token_indices or []
    if isinstance(asked, Mapping):
        return list(next(indices for name, indices in asked.items() if names_path(name, path)))
    return list(asked)


def _asked(config: LoraConfig) -> object:
    asked = config.trainable_token_indices
    return {name: list(indices) for name, indices in asked.items()} if isinstance(asked, Mapping) else list(asked or [])
