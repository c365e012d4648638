"""Measure the calibration rows of an int8 base: several rows per forward pass, or one row at a time.

A forward pass of a short row takes almost as long as one of several rows, because each weight is read once per pass.
Rows of similar lengths are padded to one batch. Padding is not measured, and each row has its own loss. If that is not
possible for a model or a task, each row has its own batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.data import Batch
from lorakit.data.encoding import IGNORED
from lorakit.errors import NotYetSupported

MOST_TOKENS = 1024
"""Maximum number of tokens in a batch of several rows, with padding; more take more memory and hardly less time."""


@dataclass(frozen=True)
class CalibrationRows:
    """The calibration rows of a run, and how their losses are computed.

    Attributes:
        rows: Batches of one row, in the run's data order.
        pad_id: Id of the padding token.
        batch_tokens: Maximum number of tokens in a batch of several rows, including padding.
        loss: Function of the model and a batch of one row that returns the mean loss, a scalar.
        row_losses: Function of the model and a batch of several rows that returns the summed loss of each row (rows,),
            or None. It raises NotYetSupported if it cannot do so for the model.
    """

    rows: Sequence[Batch]
    pad_id: int
    batch_tokens: int
    loss: Callable[[nn.Module, Batch], Tensor]
    row_losses: Callable[[nn.Module, Batch], Tensor] | None = None

    def layouts(self) -> list[Layout]:
        """Return the ways to measure the rows, fastest first; the last one is one row at a time."""
        alone = Layout(self, [[number] for number in range(len(self.rows))])
        groups = [] if self.row_losses is None else by_length(self.rows, self.batch_tokens)
        return [Layout(self, groups), alone] if any(len(group) > 1 for group in groups) else [alone]


@dataclass(frozen=True)
class Layout:
    """Calibration rows in batches.

    Attributes:
        of: The rows.
        groups: Indices of the rows of each batch.
    """

    of: CalibrationRows
    groups: Sequence[Sequence[int]]

    def quantize(self, model: nn.Module, keep: bool) -> tuple[core.Int8Base, list[float]]:
        """Quantize a base for int8 matmuls, and return the mean loss of each row before that, in the order of the rows.

        Args:
            model: The model with its adapter, changed in place.
            keep: Whether to keep the original modules.

        Raises:
            NotYetSupported: The rows cannot be measured in these batches; the model is unchanged.
            LorakitError: `lorakit.core.quantize_base` failed; the error class and message say why.
        """
        inputs, forward = self._inputs()
        is_padded = any(len(group) > 1 for group in self.groups)
        base = core.quantize_base(model, inputs, keep=keep, forward=forward, needs_mask=is_padded)
        return base, self._in_order(base.losses)

    def losses(self, model: nn.Module) -> list[float]:
        """Return the mean loss of each row on the base, without adapters, in the order of the rows.

        Args:
            model: The model; unchanged.

        Raises:
            NotYetSupported: The rows cannot be measured in these batches.
        """
        inputs, forward = self._inputs()
        return self._in_order(core.base_losses(model, inputs, forward))

    def _inputs(self) -> tuple[list[dict[str, Tensor]], Callable[[nn.Module, Mapping[str, Tensor]], Tensor]]:
        """Return the model's inputs of each batch, and the function that runs the model on them."""
        rows, batches = self.of.rows, dict[int, tuple[Sequence[int], Batch]]()
        inputs = []
        for group in self.groups:
            batch = rows[group[0]] if len(group) == 1 else together([rows[number] for number in group], self.of.pad_id)
            inputs.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
            batches[id(inputs[-1])] = group, batch

        def forward(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
            group, batch = batches[id(given)]
            if self.of.row_losses is None or len(group) == 1:
                return self.of.loss(model, batch)
            sums = self.of.row_losses(model, batch)
            return sums / torch.tensor([rows[number].trained_tokens for number in group], device=sums.device)

        return inputs, forward

    def _in_order(self, losses: Sequence[float]) -> list[float]:
        numbers = [number for group in self.groups for number in group]
        by_number = dict(zip(numbers, losses, strict=True))
        return [by_number[number] for number in range(len(numbers))]


def measured(rows: CalibrationRows, model: nn.Module, keep: bool) -> tuple[core.Int8Base, list[float], list[float]]:
    """Quantize a base for int8 matmuls, and measure the loss of each calibration row before and after it.

    Args:
        rows: The calibration rows.
        model: The model with its adapter, changed in place.
        keep: Whether to keep the original modules.

    Returns:
        The base, and the mean losses of the rows with the original weights and in int8.

    Raises:
        LorakitError: `lorakit.core.quantize_base` failed; the error class and message say why.
    """
    layouts = rows.layouts()
    (base, before), left = _first_possible(layouts, lambda layout: layout.quantize(model, keep))
    after, _ = _first_possible(left, lambda layout: layout.losses(model))
    return base, before, after


def _first_possible(layouts: Sequence[Layout], run: Callable[[Layout], Any]) -> tuple[Any, Sequence[Layout]]:
    """Return the result for the first layout that the model supports, and this layout with those after it."""
    for number, layout in enumerate(layouts[:-1]):
        try:
            return run(layout), layouts[number:]
        except NotYetSupported:
            continue
    return run(layouts[-1]), layouts[-1:]


def by_length(rows: Sequence[Batch], most: int) -> list[list[int]]:
    """Divide rows into groups of similar lengths.

    Args:
        rows: Batches of one row.
        most: Maximum number of tokens in a group of several rows, including padding.

    Returns:
        The indices of the rows of each group, shortest rows first.
    """
    groups = list[list[int]]()
    for number in sorted(range(len(rows)), key=lambda one: rows[one].input_ids.numel()):
        if groups and (len(groups[-1]) + 1) * rows[number].input_ids.numel() <= most:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def together(rows: Sequence[Batch], pad_id: int) -> Batch:
    """Combine batches of one row for a causal language model into one, padded on the right.

    Args:
        rows: The batches, at least one, whose labels have the shape of their ids.
        pad_id: Id of the padding token.
    """
    ids, masks, labels = ([getattr(row, name)[0] for row in rows] for name in ("input_ids", "attention_mask", "labels"))
    pad = nn.utils.rnn.pad_sequence
    return Batch(
        pad(ids, batch_first=True, padding_value=pad_id),
        pad(masks, batch_first=True),
        pad(labels, batch_first=True, padding_value=IGNORED),
        rows[-1].epoch,
        sum(row.tokens for row in rows),
        sum(row.trained_tokens for row in rows),
    )
