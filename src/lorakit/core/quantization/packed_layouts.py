"""Weights in the layouts of files that lorakit does not write: GPTQ, AWQ and compressed-tensors.

GPTQ and AWQ pack integers into int32 words, with scales and zero points per group: W = (code − zero) · scale, where a
group of input features shares a scale and a zero point for each output. They differ in the axis and the order in which
codes are packed.

compressed-tensors stores int8 or fp8 values with scales per tensor, row, group or block: W = (value − zero) · scale.
Activations are not quantized, so scales of activations in the files have no effect. The layouts were compared with
those of compressed-tensors 0.20.

Sources:
    Frantar et al. 2022, arXiv:2210.17323, and the files that AutoGPTQ and GPTQModel write;
    Lin et al. 2023, arXiv:2306.00978, and the files that AutoAWQ writes ("gemm").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lorakit.core.quantization.packed import PackedFormat, PackedLayout, PackedLinear, spread
from lorakit.errors import ModelError

WORD = 32
"""Bits per packed word."""

AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output feature, among eight, that each nibble of an AWQ word holds, lowest bits first."""


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes in packed words, as integers (n·32/bits, …), for words (n, …) in int32.

    Codes form a stream of bits along the first axis, lowest bits first; with 3 bits, a code can span two words.
    """
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        shifts = shifts.view(1, -1, *[1] * (words.ndim - 1))
        return ((words.unsqueeze(1) >> shifts) & mask).flatten(0, 1)
    wide = words.long() & ((1 << WORD) - 1)
    offsets = torch.arange(0, words.shape[0] * WORD - bits + 1, bits, device=words.device)
    first, shift = offsets // WORD, (offsets % WORD).view(-1, *[1] * (words.ndim - 1))
    second = (first + 1).clamp(max=words.shape[0] - 1)
    return ((wide[first] >> shift) | (wide[second] << (WORD - shift))) & mask


@dataclass(frozen=True)
class GptqLayout(PackedLayout):
    """A weight packed as GPTQ does: codes along the input features, zero points along the output features.

    Attributes:
        bits: Bits per code: 2, 3, 4 or 8.
        offset: Number to add to a stored zero point: 1 in files of the first version, 0 in files of the second.
    """

    bits: int
    offset: int

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return the weight (out, in) in fp32.

        Args:
            parts: Codes (in·bits/32, out) and zero points (groups, out·bits/32) in int32, scales (groups, out), and
                optionally the group of each input feature, (in,).
        """
        words, packed_zeros, scales, *rest = parts
        codes = unpack(words, self.bits)[: self.columns]
        zeros = unpack(packed_zeros.T, self.bits)[: self.rows].T + self.offset
        group = rest[0].long() if rest else _groups(self.columns, scales)
        weight = (codes - zeros[group]).float().mul_(scales.float()[group])
        return weight.T


@dataclass(frozen=True)
class AwqLayout(PackedLayout):
    """A weight packed as AWQ does ("gemm"): codes and zero points along the output features, interleaved."""

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return the weight (out, in) in fp32.

        Args:
            parts: Codes (in, out/8) and zero points (groups, out/8) in int32, and scales (groups, out).
        """
        words, packed_zeros, scales = parts
        group = _groups(self.columns, scales)
        codes, zeros = _interleaved(words), _interleaved(packed_zeros)
        weight = (codes - zeros[group]).float().mul_(scales.float()[group])
        return weight.T


def _groups(columns: int, scales: Tensor) -> Tensor:
    """Return the group (in,) of each input feature, for groups of consecutive features."""
    return torch.arange(columns, device=scales.device) // -(-columns // scales.shape[0])


def _interleaved(words: Tensor) -> Tensor:
    """Return the codes (n, out) in words (n, out/8) whose nibbles are in AWQ's order."""
    order = torch.tensor(AWQ_ORDER, device=words.device).argsort()
    codes = unpack(words.T, AWQ_BITS).unflatten(0, (-1, len(AWQ_ORDER)))
    return codes[:, order].flatten(0, 1).T


class GptqLinear(PackedLinear):
    """A linear layer with a weight packed as GPTQ does.

    Attributes:
        qweight: Codes (in·bits/32, out), in int32.
        qzeros: Zero points (groups, out·bits/32), in int32.
        scales: Scales (groups, out).
        g_idx: Group of each input feature, (in,), or None if groups are consecutive.
        bits: Bits per code.
        offset: Number to add to a stored zero point.
    """

    BITS = (2, 3, 4, 8)
    PARTS = ("qweight", "qzeros", "scales", "g_idx")
    OPTIONAL = frozenset({"g_idx"})
    bits: int = 4
    offset: int = 1

    @property
    def layout(self) -> GptqLayout:
        """Return the layout of the packed tensors."""
        return GptqLayout(self.out_features, self.in_features, self.bits, self.offset)


class AwqLinear(PackedLinear):
    """A linear layer with a weight packed as AWQ does.

    Attributes:
        qweight: Codes (in, out/8), in int32.
        qzeros: Zero points (groups, out/8), in int32.
        scales: Scales (groups, out).
    """

    BITS = (AWQ_BITS,)
    PARTS = ("qweight", "qzeros", "scales")

    @property
    def layout(self) -> AwqLayout:
        """Return the layout of the packed tensors."""
        return AwqLayout(self.out_features, self.in_features)


class _IntegerFormat(PackedFormat):
    """Format of integers that are packed into words."""

    def check(self, module: PackedLinear, path: str) -> None:
        """Check that all packed tensors are present and fit; a ModelError also for infinite scales."""
        super().check(module, path)
        index, groups = module._parameters.get("g_idx"), len(cast(Tensor, module.scales))
        if index is not None and not index.is_meta and not bool(((index >= 0) & (index < groups)).all()):
            text = f"{path}.g_idx has values outside 0 to {groups - 1}, the groups of scales; load undamaged files."
            raise ModelError(text, what="g_idx", where=path, field="g_idx")

    def fits(self, module: PackedLinear, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a packed tensor has the shape that the class of the layer describes."""
        rows, columns, groups = module.out_features, module.in_features, len(cast(Tensor, module.scales))
        if isinstance(module, GptqLinear):
            packed_rows, words = -(-rows * module.bits // WORD), (-(-columns * module.bits // WORD), rows)
        else:
            packed_rows = -(-rows * AWQ_BITS // WORD)
            words = (columns, packed_rows)
        shapes = {"qweight": words, "qzeros": (groups, packed_rows), "scales": (groups, rows), "g_idx": (columns,)}
        return shape == shapes[name]


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
            weight = weight - self.spread(zeros[0])
        return weight * self.spread(scales)

    def spread(self, scales: Tensor) -> Tensor:
        """Return scales or zero points in fp32, repeated for every value (out, in), or as a scalar."""
        if scales.numel() == 1:
            return scales.float().reshape(())
        if self.block is not None:
            return spread(scales, self.block, self.rows, self.columns)
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


_HERE = "lorakit.core.quantization.packed_layouts"
GPTQ = _IntegerFormat("GPTQ", (f"{_HERE}.GptqLinear",), layer=GptqLinear)
AWQ = _IntegerFormat("AWQ", (f"{_HERE}.AwqLinear",), layer=AwqLinear)
COMPRESSED = CompressedFormat("compressed-tensors", (f"{_HERE}.CompressedLinear",), layer=CompressedLinear)
