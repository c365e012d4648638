"""Rank table: trainable parameters at each of several ranks, by distinct shape of site.

`lorakit.plan.params` counts; this module only builds the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.architectures.shapes import ModelShape, role, short_roles
from lorakit.config import LoraConfig
from lorakit.errors import UsageError
from lorakit.plan.params import count


@dataclass(frozen=True)
class RankRow:
    """One distinct shape of site in a rank table.

    Attributes:
        labels: The modules with this shape.
        kind: Their kind.
        out_features: Rows of the weight.
        in_features: Columns of it.
        sites: Number of sites with it.
        each: Parameters that one such site trains, by column.
    """

    labels: tuple[str, ...]
    kind: str
    out_features: int
    in_features: int
    sites: int
    each: tuple[int, ...]


@dataclass(frozen=True)
class RankTable:
    """Trainable parameters by rank.

    Attributes:
        ranks: The columns.
        rows: One per distinct shape of site.
        totals: Trainable parameters at each rank, over all sites, with copies and biases.
        shares: The same as a fraction of the base.
    """

    ranks: tuple[int, ...]
    rows: tuple[RankRow, ...]
    totals: tuple[int, ...]
    shares: tuple[float, ...]


def rank_table(shape: ModelShape, config: LoraConfig, ranks: Sequence[int], optimizer: str = "adamw") -> RankTable:
    """Return the trainable parameters by rank: one row per distinct shape of site and a total, one column per rank.

    Args:
        shape: The model.
        config: The adapter; the column's rank overrides its rank and `rank_pattern`.
        ranks: The columns.
        optimizer: As in `Job`.

    Returns:
        The table.

    Raises:
        UsageError: A rank is below 1, or there is none.
        TargetError: As for `count`.
    """
    if not ranks or any(rank < 1 for rank in ranks):
        raise UsageError(f"ranks must be one or more integers of at least 1, such as 4,8,16,32; got {list(ranks)}.")
    columns = [
        count(shape, dataclasses.replace(config, r=rank, rank_pattern={}), optimizer=optimizer) for rank in ranks
    ]
    labels = short_roles(site.path for site in columns[0].sites)
    rows: dict[tuple[str, int, int, int, int], list[int]] = {}
    for index, site in enumerate(columns[0].sites):
        size = (site.out_features, site.in_features, site.experts, site.own_numbers)
        rows.setdefault((site.kind, *size), []).append(index)
    return RankTable(
        tuple(ranks),
        tuple(
            RankRow(
                tuple(dict.fromkeys(labels[role(columns[0].sites[i].path)] for i in members)),
                *key[:3],
                len(members),
                tuple(column.sites[members[0]].trainable for column in columns),
            )
            for key, members in rows.items()
        ),
        tuple(column.trainable for column in columns),
        tuple(column.share for column in columns),
    )
