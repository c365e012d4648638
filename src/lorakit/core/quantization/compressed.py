"""Weights in the layouts of compressed-tensors: int8 or fp8 values with scales per tensor, row, group or block.

W = (value − zero) · scale. Activations are not quantized, so scales of activations in the files have no effect. The
layouts were compared with those of compressed-tensors 0.20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.quantization.packed import PackedFormat, PackedLayout, PackedLinear, spread


@dataclass(frozen=True)
class CompressedLayout(PackedLayout):
    """Values (out, in) with one scale, and optionally one zero point, for each block of (rows, columns).

    If the block is None, the sizes of the scales determine it: the tensor, a row, or a group of a row.
    """

    block: tuple[int, int] | None

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return the weight (out, in) in fp32, from values in int8 or float8_e4m3fn, scales and perhaps zero points."""
        values, scales, *zeros = parts
        weight = values.float()
        if zeros:
            weight = weight - self._spread(zeros[0])
        return weight * self._spread(scales)

    def _spread(self, scales: Tensor) -> Tensor:
        if self.block is not None:
            return spread(scales, self.block, self.rows, self.columns)
        if scales.numel() == 1:
            return scales.float().reshape(())
        scales = scales.reshape(self.rows, -1)
        return spread(scales, (1, -(-self.columns // scales.shape[1])), self.rows, self.columns)


class CompressedLinear(PackedLinear):
    """A linear layer with a weight in a layout of compressed-tensors.

    Attributes:
        weight: Values (out, in), in int8 or float8_e4m3fn.
        weight_scale: Scales: (1,), (out, 1), (out, groups) or (out/block, in/block).
        weight_zero_point: Zero points in the shape of the scales, or None.
        block: Rows and columns that share a scale, or None if the shape of the scales determines them.
    """

    PARTS = ("weight", "weight_scale", "weight_zero_point")
    OPTIONAL = frozenset({"weight_zero_point"})
    block: tuple[int, int] | None = None

    @property
    def layout(self) -> CompressedLayout:
        """Return the layout of the values and scales."""
        return CompressedLayout(self.out_features, self.in_features, self.block)


class CompressedFormat(PackedFormat):
    """Format of a weight in a layout of compressed-tensors."""

    def fits(self, module: PackedLinear, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether values are (out, in), and scales or zero points fit the block, or a tensor, row or group."""
        rows, columns = module.out_features, module.in_features
        block: tuple[int, int] | None = module.block  # type: ignore[assignment]
        if name == "weight":
            return shape == (rows, columns)
        if block is not None:
            return shape == (-(-rows // block[0]), -(-columns // block[1]))
        count = torch.Size(shape).numel()
        return count == 1 or (shape[0] == rows and count % rows == 0 and columns % (count // rows) == 0)


COMPRESSED = CompressedFormat(
    "compressed-tensors", ("lorakit.core.quantization.compressed.CompressedLinear",), layer=CompressedLinear
)
