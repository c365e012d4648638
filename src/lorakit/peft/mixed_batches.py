"""Batches whose rows have different adapters, in PEFT's words: what it refuses, and how programs hear of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lorakit.core.layering.layer_names import LAYERS
from lorakit.errors import RouteError

NOTHING: Mapping[str, Any] = {}

BASE_NAME = "__base__"
"""In `adapter_names`: a row that runs on the base alone."""

LENGTH = "Length of `adapter_names` should be the same as the number of inputs, but got {rows}."
ONE_WEIGHT = "lora.{layer} does not support mixed adapter batches yet."
COPIES = "Mixed batching is only supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d."


class MixedBatchError(RouteError, TypeError):
    """A module on the model cannot take a batch of several adapters; PEFT raises a TypeError."""


@contextlib.contextmanager
def in_peft_words(
    names: Sequence[str] | None, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NOTHING
) -> Iterator[None]:
    """A block around a forward, or a generation, whose refusals of a mixed batch begin as PEFT's do.

    Args:
        names: One adapter per row, or None.
        args: What the forward takes; nothing of a generation, which makes rows of its own.
        kwargs: Its options; the first tensor among them all, (rows, …), is the batch.

    Yields:
        Nothing.

    Raises:
        RouteError: The rows do not fit the batch.
        MixedBatchError: A module cannot take such a batch.
    """
    batch = next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor) and given.ndim), None)
    if names is not None and set(names) == {BASE_NAME} and batch is not None and len(batch) != len(names):
        raise RouteError(f"{LENGTH.format(rows=len(names))} The batch has {len(batch)} rows.")  # no layer counts these
    try:
        yield
    except RouteError as refused:
        said = str(refused)
        kind = re.search(r"a (\w+) has one weight for all rows", said)
        if names is None:
            raise
        if "The route names" in said:
            raise RouteError(f"{LENGTH.format(rows=len(names))} {said}") from refused
        if kind is not None:
            layer = LAYERS[kind.group(1)].__name__ if kind.group(1) in LAYERS else kind.group(1)
            raise MixedBatchError(f"{ONE_WEIGHT.format(layer=layer)} {said}") from refused
        if said.startswith("A copied module returns"):
            raise MixedBatchError(f"{COPIES} {said}") from refused
        raise
