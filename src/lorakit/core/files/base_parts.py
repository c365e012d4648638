"""The tensors of a base under the names and shapes that the plain base gives them, and numbers read from each.

Adapters, merges and trained biases do not show; a quantized weight has the name and shape it had before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layering.underlying import QuantisedWeight, base_tensors, quantised_weights

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Part:
    """A parameter or buffer as the plain base has it.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype, or the way a quantized weight is stored.
        key: The same for every name of a shared tensor.
        tensor: The tensor (…), or None for a quantized weight.
        weight: The quantized weight, or None.
        is_buffer: Whether it is a buffer.
    """

    shape: tuple[int, ...]
    dtype: str
    key: int
    tensor: Tensor | None
    weight: QuantisedWeight | None = None
    is_buffer: bool = False

    def is_readable(self, elsewhere: bool) -> bool:
        """Return whether its values can be read: here, or, for a plain tensor on the meta device, elsewhere."""
        if self.weight is not None:
            return not any(tensor.is_meta for tensor in self.weight.base.tensors(self.weight.stored))
        return self.tensor is not None and self.tensor.is_floating_point() and (elsewhere or not self.tensor.is_meta)

    @property
    def device(self) -> torch.device:
        """Device on which `bits` takes its positions."""
        return self.tensor.device if self.tensor is not None else torch.device("cpu")

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype whose patterns `bits` gives."""
        return torch.float32 if self.tensor is None else self.tensor.dtype

    def bits(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read values at positions of the flattened tensor.

        Args:
            positions: Whole numbers (n,), on `device`.

        Returns:
            Bit patterns (n,) as integers of the dtype's width (quantized: of fp32); for a quantized weight also how far
            each value may be from the one that was quantized, (n,).
        """
        if self.weight is not None:
            rows, columns = _canonical(self.weight)
            if self.shape != (rows, columns):  # the plain base has it as (in, out)
                positions = positions % rows * columns + positions // rows
            values, bound = self.weight.base.values(self.weight.stored, positions)
            return values.float().view(torch.int32), bound
        tensor: Tensor = self.tensor.detach()  # type: ignore[union-attr]
        if type(tensor) is Tensor and tensor.is_contiguous():
            return tensor.view(-1).view(_BITS[tensor.element_size()])[positions], None
        values = tensor[torch.unravel_index(positions, tensor.shape)].contiguous()
        return values.view(_BITS[values.element_size()]), None


def part_of(tensor: Tensor, cut: Mapping[int, int], is_buffer: bool = False) -> Part:
    """Return a plain tensor as a part.

    Args:
        tensor: A tensor of any shape.
        cut: Id of a tensor -> how many of its rows count, if it has more.
        is_buffer: Whether it is a buffer.
    """
    meant = tensor[: cut[id(tensor)]] if id(tensor) in cut else tensor
    name = str(tensor.dtype).removeprefix("torch.")
    return Part(tuple(meant.shape), name, id(tensor), meant, is_buffer=is_buffer)


def parts_of(model: nn.Module, cut: Mapping[int, int]) -> dict[str, Part]:
    """Return a base's parameters and persistent buffers by the names of the plain base.

    Args:
        model: A model with or without adapters; only read.
        cut: As in `part_of`.
    """
    quantised = {weight.packed: weight for weight in quantised_weights(model, stacked=False)}
    parts = {}
    for name, tensor, module in base_tensors(model, stacked=False):
        weight = quantised.get(name)
        if weight is not None:
            rows, columns = _canonical(weight)
            before = getattr(weight.module, "source_cls", nn.Linear).__name__
            laid = (columns, rows) if before == "Conv1D" else (rows, columns)
            parts[weight.name] = Part(laid, weight.base.name, id(weight.module), None, weight)
            if weight.loose_bias is not None:
                parts[weight.name.removesuffix("weight") + "bias"] = part_of(weight.loose_bias, {})
        else:
            parts[name] = part_of(tensor, cut, is_buffer=name.rpartition(".")[2] not in module._parameters)
    return parts


def listing(parts: Mapping[str, Part]) -> str:
    """Return names and shapes of the parameters, one per line, sorted by name.

    Args:
        parts: What `parts_of` returned.
    """
    return "\n".join(f"{name} {part.shape}" for name, part in sorted(parts.items()) if not part.is_buffer)


def parameter_count(parts: Mapping[str, Part]) -> int:
    """Return the number of parameters; a tensor shared under several names counts once.

    Args:
        parts: What `parts_of` returned.
    """
    return sum({part.key: math.prod(part.shape) for part in parts.values() if not part.is_buffer}.values())


def _canonical(weight: QuantisedWeight) -> tuple[int, int]:
    module: Any = weight.module
    return int(module.out_features), int(module.in_features)
