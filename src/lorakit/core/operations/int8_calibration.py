"""Measure the inputs of linear layers on calibration batches, for int8 matmuls.

The batches run on the base, without adapters and in evaluation mode. The model is unchanged afterwards. The pages of a
weight that is in a mapped file are given back after each use, so that the original weights are not all in memory at
once. Which layers are measured, and what is done with the result, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.model.activation import disable
from lorakit.core.model.index import find_state
from lorakit.core.statistics.collecting import Forward, in_mode
from lorakit.errors import DataError, NotYetSupported
from lorakit.mapped_files import release_pages
from lorakit.targets.layer_types import CONV1D


@dataclass
class Target:
    """A linear layer to quantize.

    Attributes:
        path: Path of the module.
        module: The `nn.Linear` or `Conv1D`.
        absmax: Largest |x| of each input channel, (in,), fp32.
        group: Number of the group of layers that share an input; -1 until the layer has run.
    """

    path: str
    module: nn.Module
    absmax: Tensor
    group: int = -1

    @property
    def weight(self) -> Tensor:
        """Return the weight (out, in)."""
        W = cast(Tensor, self.module.weight).detach()
        return W.t() if type(self.module).__name__ == CONV1D else W

    def release(self) -> None:
        """Give back the memory of the weight if it can be read from its file again."""
        release_mapped(cast(Tensor, self.module.weight))


def release_mapped(tensor: Tensor) -> bool:
    """Give back the memory of a weight (out, in) if it is in a mapped file and unmodified; its values stay.

    Returns:
        Whether the memory was given back.
    """
    size = tensor.numel() * tensor.element_size()
    return tensor.device.type == "cpu" and release_pages(tensor.data_ptr(), size)


def base_losses(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward | None = None
) -> tuple[float, ...]:
    """Return the loss of the base, without adapters, on each batch, as `quantize_base` measures it.

    Args:
        model: A model with or without adapters; unchanged.
        batches: As in `quantize_base`; a batch without labels has no loss.
        forward: As in `quantize_base`.

    Returns:
        The losses of all batches in their order; those of one batch are in the order of its rows.

    Raises:
        DataError: There are no batches.
    """
    return run_batches(model, batches, forward or run_batch, None)[0]


def run_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Return the model's output for one batch of keyword arguments, without a key-value cache."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return model(**batch, **({"use_cache": False} if takes_cache and "use_cache" not in batch else {}))


class Calibration:
    """Hooks that record the largest input of each channel, and which layers get the same input.

    Args:
        targets: The layers.
        needs_mask: Whether a batch with padding whose positions cannot be told apart in the input of a layer is an
            error; otherwise, all positions of that input are used.
    """

    def __init__(self, targets: Sequence[Target], *, needs_mask: bool = False) -> None:
        self.targets, self.needs_mask = targets, needs_mask
        self.mask: Tensor | None = None
        self.inputs: list[tuple[Tensor, int]] = []
        self.groups = 0
        self.latest: tuple[Tensor, int, Tensor] | None = None

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """Use the attention mask (rows, length) of a batch, if it has padding."""
        mask = batch.get("attention_mask")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()) else None
        self.inputs.clear()

    def hooks(self) -> list[RemovableHandle]:
        """Register hooks on all layers: one records the input, another gives back the memory of the weight."""
        found = []
        for target in self.targets:
            found.append(target.module.register_forward_pre_hook(self._recorder(target)))
            found.append(target.module.register_forward_hook(lambda *_, target=target: target.release()))
        return found

    def _recorder(self, target: Target) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if target.group < 0:
                target.group = self._group(args[0])
            largest = self._largest(target, args[0])
            torch.maximum(target.absmax, largest.to(target.absmax.device), out=target.absmax)

        return record

    def _largest(self, target: Target, x: Tensor) -> Tensor:
        """Return the largest |x| of each channel, (in,), in fp32; layers in succession with one input share it."""
        version = -1 if x.is_inference() else x._version
        if self.latest is not None and self.latest[0] is x and self.latest[1] == version >= 0:
            return self.latest[2]
        values = self._tokens(target, x.detach()).reshape(-1, x.shape[-1])
        largest = values.abs().amax(0).float() if len(values) else x.new_zeros(x.shape[-1], dtype=torch.float32)
        self.latest = (x, version, largest)
        return largest

    def _tokens(self, target: Target, x: Tensor) -> Tensor:
        """Return the input x (rows, length, …, in) or (rows · length, in) of a layer without padding.

        Raises:
            NotYetSupported: `needs_mask` is true, and x has another shape.
        """
        if self.mask is None:
            return x
        if x.shape[:2] == self.mask.shape:
            return x[self.mask]
        if x.ndim == 2 and len(x) == self.mask.numel():
            return x[self.mask.flatten()]
        if self.needs_mask:
            raise NotYetSupported(
                f"{target.path}: padding cannot be excluded from an input of shape {tuple(x.shape)}; pass batches "
                "without padding.",
                what=tuple(x.shape),
                where=target.path,
                field="batches",
            )
        return x

    def _group(self, x: Tensor) -> int:
        """Return the number of the group with the input x (…, in); the last inputs are held, so that ids are unique."""
        for held, group in self.inputs:
            if held is x:
                return group
        self.groups += 1
        self.inputs = [*self.inputs[-1:], (x, self.groups)]
        return self.groups


def run_batches(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward, calibration: Calibration | None
) -> tuple[tuple[float, ...], int]:
    """Run all batches on the base in evaluation mode; return the losses and the number of tokens.

    Raises:
        DataError: There are no batches.
    """
    handles = [] if calibration is None else calibration.hooks()
    losses, tokens, count = list[float](), 0, 0
    try:
        with torch.no_grad(), in_mode(model, False), _without_adapters(model):
            for batch in batches:
                if calibration is not None:
                    calibration.begin(batch)
                found = forward(model, batch)
                loss = found if isinstance(found, Tensor) and found.ndim < 2 else getattr(found, "loss", None)
                losses += [] if loss is None else loss.reshape(-1).tolist()
                tokens, count = tokens + _tokens(batch), count + 1
                del found, loss
    finally:
        for handle in handles:
            handle.remove()
        if calibration is not None:
            calibration.inputs.clear()
            calibration.latest = None
    if not count:
        raise DataError("`batches` is empty; pass at least one batch of calibration data.", field="batches")
    return tuple(losses), tokens


def _without_adapters(model: nn.Module) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if find_state(model) is None else disable(model)


def _tokens(batch: Mapping[str, Tensor]) -> int:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.sum())
    return ids.numel() if isinstance(ids, Tensor) else 0


def agree_on(targets: Sequence[Target], tokens: int) -> int:
    """Give all processes the largest inputs of any process; return the number of tokens of all processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and targets):
        return tokens
    joined = torch.cat([target.absmax.to(targets[0].absmax.device) for target in targets])
    joined.nan_to_num_(nan=torch.inf)  # whether a maximum with NaN is NaN depends on the backend
    distributed.all_reduce(joined, distributed.ReduceOp.MAX)
    for target, part in zip(targets, joined.split([len(target.absmax) for target in targets]), strict=True):
        target.absmax.copy_(part)
    count = torch.tensor([tokens], device=joined.device)
    distributed.all_reduce(count)
    return int(count)
