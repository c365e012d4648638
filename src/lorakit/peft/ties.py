"""What is said before a merge gives weights that are shared one of their own: tied embeddings, and stacked layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lorakit.core.merging.merging import tied_sites
from lorakit.errors import warn_caller


def warn_of_ties(model: nn.Module, names: Sequence[str]) -> tuple[bool, bool]:
    """Say which weights a merge must untie.

    Args:
        model: An adapted model.
        names: The adapters that are merged.

    Returns:
        Whether something must be untied, and whether that ends `tie_word_embeddings`.
    """
    stacked: list[tuple[str, str]] = []
    tied: list[tuple[str, str]] = []
    for path, other in tied_sites(model, names):
        copies = _without_numbers(path) == _without_numbers(other.rpartition(".")[0])
        (stacked if copies else tied).append((path, other))
    for pairs, why in (
        (tied, "so the model is no longer tied (tie_word_embeddings is False from now on)."),
        (stacked, "as every layer that layer_replication made gets one: the model needs the memory of all its layers."),
    ):
        if pairs:
            path, other = pairs[0]
            warn_caller(f"{path} shares its weight with {other}; merging gives it a weight of its own, {why}")
    return bool(tied or stacked), bool(tied)


def _without_numbers(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
