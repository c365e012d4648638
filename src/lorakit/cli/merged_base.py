"""Merge the only answering adapter into a base that the command loaded for itself, if that is exact.

No other thread or adapter uses this base, so no copy of its weights is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.cli import console
from lorakit.errors import MergeError

WORTHWHILE_TOKENS = 128
"""Minimum number of tokens for an automatic merge: a merge takes as long as the adapter adds to about a hundred tokens
of SmolLM2-135M with rank 16 on all linear layers (rough; longer for larger models, in which an adapter adds less)."""


def write_into_base(
    model: Any,
    names: Sequence[str | None],
    labels: Mapping[str, str],
    wanted: bool | None,
    tokens: int,
    detail: Callable[[str], None] = console.note,
) -> bool:
    """Merge the only answering adapter into the base permanently, or leave it unmerged.

    Args:
        model: The base with its adapters, not used elsewhere; after a merge it is a plain model.
        names: Adapters that answer, or None for the base.
        labels: Adapter -> its folder as given by the user.
        wanted: True to merge, False not to, None if the merge is exact and saves time.
        tokens: Maximum number of new tokens in total.
        detail: Called with a line if the adapter is merged.

    Returns:
        Whether the adapter is merged.

    Raises:
        MergeError: A merge was requested that is not exact or not possible. The model is unchanged.
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
        except MergeError as refusal:  # such as NaN in the result, which only the merge itself detects
            reason = str(refusal)
    if reason is None:
        dtype = str(model.dtype).removeprefix("torch.")
        detail(f"{folder}: merged into the base in memory, which is exact in {dtype} (--no-merged: not merged)")
    elif wanted:
        raise MergeError(
            f"{folder}: --merged is for exact merges, and this one is not. {reason} Leave out --merged.", where=folder
        )
    return reason is None
