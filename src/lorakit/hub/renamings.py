"""One renaming of tensors, in transformers' own words."""

from __future__ import annotations

from typing import Any


def renaming(source: str, target: str) -> Any:
    """A rule of transformers' loader.

    Args:
        source: Pattern in a tensor's name.
        target: What stands there afterwards.
    """
    from transformers.core_model_loading import WeightRenaming

    return WeightRenaming(source_patterns=source, target_patterns=target)
