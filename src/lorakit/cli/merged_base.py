"""Writes the one adapter that answers into a base that the verb loaded for itself, where that loses nothing.

No other thread or adapter uses such a base, so no copy of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.cli import console
from lorakit.errors import MergeError

WORTHWHILE_TOKENS = 128
"""Where fewer are asked for, no merge is made by itself: it takes as long as the adapter adds to about a hundred tokens
of SmolLM2-135M with rank 16 on all linear layers (rough; longer for larger models, where an adapter adds less)."""


def write_into_base(
    model: Any,
    names: Sequence[str | None],
    labels: Mapping[str, str],
    wanted: bool | None,
    tokens: int,
    detail: Callable[[str], None] = console.note,
) -> bool:
    """Merge an adapter that answers alone into the base for good, or leave it beside the base.

    Args:
        model: The base, of which no one else knows, with its adapters; after a merge it is a plain model.
        names: Who answers: adapters, or None for the base.
        labels: Adapter -> its folder as the user gave it.
        wanted: True to merge, False not to, None where the merge is exact and pays.
        tokens: New tokens that may be generated in total.
        detail: Called with a line if it is merged.

    Returns:
        Whether it is merged.

    Raises:
        MergeError: The merge was asked for, and it is not exact or cannot be done. The model is as it was.
    """
    from lorakit import core

    name = names[0] if len(names) == 1 else None
    if name is None or wanted is False or (wanted is None and tokens < WORTHWHILE_TOKENS):
        return False
    folder = labels[name]
    reason = core.explain_inexact_merge(model, name)
    if reason is None:
        try:
            core.merge_and_unload(model, name)
        except MergeError as refusal:  # such as NaN in the result, which only the merge itself finds
            reason = str(refusal)
    if reason is None:
        dtype = str(model.dtype).removeprefix("torch.")
        detail(f"{folder}: merged into the base in memory, which is exact in {dtype} (--no-merged: not merged)")
    elif wanted:
        raise MergeError(
            f"{folder}: --merged is for exact merges, and this is none. {reason} Leave out --merged.", where=folder
        )
    return reason is None
