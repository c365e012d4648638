"""Rows of tables that are trained alone (`trainable_token_indices`), counted.

What shares its weight with a table acts with the same rows, and counts once. Knows nothing about factors or bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorakit.config import LoraConfig
from lorakit.errors import TargetError
from lorakit.plan.shapes import ModelShape, SiteShape
from lorakit.targets import names_path


def trained_rows(shape: ModelShape, config: LoraConfig, adapted: Collection[str]) -> dict[str, int]:
    """Numbers in the rows that a config trains, by table.

    Args:
        shape: The model.
        config: The adapter.
        adapted: Paths of the sites that it gives factors.

    Returns:
        Path of a table -> rows × width.

    Raises:
        TargetError: A name matches no table, or the table has factors too.
    """
    named = _named(shape, config.trainable_token_indices)
    found: dict[str, int] = {}
    leaders: dict[str, Sequence[int]] = {}
    for site, indices in sorted(named, key=lambda pair: pair[0].kind != "Embedding"):
        weight = site.tied_to or site.path
        if site.path in adapted or weight in adapted:
            raise TargetError(
                f"trainable_token_indices cannot be applied to {site.path}: the adapter has factors there. Take it out "
                "of target_modules."
            )
        if leaders.get(weight) != indices:
            leaders.setdefault(weight, indices)
            found[site.path] = len(indices) * (site.out_features if site.kind == "Embedding" else site.in_features)
    return found


def with_new_tokens(shape: ModelShape, config: LoraConfig, tokens: int) -> LoraConfig:
    """A copy of a config that trains as many rows more as tokens are added, as `lorakit train --new-tokens` does.

    Args:
        shape: The model, as it is before.
        config: The adapter.
        tokens: How many are added.

    Raises:
        TargetError: The model has no embedding.
    """
    (embedding, _), *_ = _named(shape, [])
    rows = list(range(embedding.in_features, embedding.in_features + tokens))
    heads = [s for s in shape.sites if s.kind == "Linear" and not s.dense and s.out_features == embedding.in_features]
    apart = [head.path for head in heads if head.tied_to != embedding.path]
    asked: Any = dict.fromkeys((embedding.path, *apart), rows) if apart else rows
    return config.with_fields(trainable_token_indices=asked)


def read_out(shape: ModelShape, rows: Mapping[str, int]) -> int:
    """Numbers in trained rows of heads, and of embeddings that a head is tied to: these meet every hidden state.

    Args:
        shape: The model.
        rows: Path of a table -> numbers in its trained rows.
    """
    heads = {path for s in shape.sites if s.kind != "Embedding" for path in (s.path, s.tied_to)}
    return sum(numbers for path, numbers in rows.items() if path in heads)


def _named(
    shape: ModelShape, asked: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> list[tuple[SiteShape, Sequence[int]]]:
    if asked is None:
        return []
    tables = [site for site in shape.sites if site.kind in ("Embedding", "Linear")]
    if not isinstance(asked, Mapping):
        inputs = [site for site in tables if site.kind == "Embedding"]
        of_tokens = [site for site in inputs if site.in_features == shape.vocab] or inputs
        if not of_tokens:
            raise TargetError("trainable_token_indices: this model has no embedding.")
        return [(of_tokens[0], asked)]
    pairs = []
    for name, indices in asked.items():
        sites = [site for site in tables if names_path(name, site.path)]
        if not sites:
            raise TargetError(f"trainable_token_indices names {name!r}, and no table of the model is called so.")
        pairs += [(site, indices) for site in sites]
    return pairs
