"""Weights in int8 for int8 matmuls (W8A8), `lorakit.ops.int8`: activations are quantized too, in both directions.

The other quantized formats multiply in the compute dtype. This one multiplies in int8, with a
scale per output channel, a scale per input channel, and a few input channels in the dtype of the original weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.choices import CONV1D
from lorakit.core.quantization.packed import PackedFormat, PackedLayout, PackedLinear, PackedWeight, packed_linear
from lorakit.core.quantization.weight_format import SOURCE
from lorakit.ops.int8 import int8_linear
from lorakit.ops.int8_weight import Int8Weight, dequantize, quantize_weight

_PARTS = ("q", "scale", "gain", "kept", "columns")
_FP32_PARTS = ("scale", "gain")


@dataclass(frozen=True)
class Int8Layout(PackedLayout):
    """The layout of an int8 weight (out, in): diag(scale)·q·diag(gain), except for the columns `kept`."""

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return the weight (out, in) in fp32, from q, scale, gain, kept and columns."""
        return dequantize(Int8Weight(*parts))

    def values(self, parts: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,), and bounds on their rounding errors (n,); the bounds are 0 in kept columns."""
        q, scale, gain, kept, columns = parts
        positions = positions.to(q.device)
        rows, channels = positions // self.columns, positions % self.columns
        steps = scale[rows] * gain[channels]
        values = q[rows, channels].float() * scale[rows] * gain[channels]
        bounds = steps / 2 * (1 + 2**-10)  # the scale and the quotient were also rounded
        if len(kept):
            nearest = torch.searchsorted(kept, channels).clamp_max(len(kept) - 1)
            is_kept = kept[nearest] == channels
            values = torch.where(is_kept, columns[rows, nearest].float(), values)
            bounds = torch.where(is_kept, 0.0, bounds)
        return values, bounds


class Int8Linear(PackedLinear):
    """A frozen linear layer that multiplies in int8, in the forward and in the backward pass.

    Attributes:
        q: Values (out, in), int8; 0 in the columns `kept`.
        scale: Scale of each output channel (out,), fp32.
        gain: Scale of each input channel (in,), fp32. Layers that share an input share this parameter.
        kept: Input channels that are not in `q`, int64 (k,), ascending; shared in the same way.
        columns: Weights of those channels (out, k), in the dtype of the original weight.
        source_cls: `Conv1D` of transformers if the layer replaced one; otherwise absent.
    """

    PARTS = _PARTS
    q: nn.Parameter
    scale: nn.Parameter
    gain: nn.Parameter
    kept: nn.Parameter
    columns: nn.Parameter

    @property
    def layout(self) -> Int8Layout:
        """Return the layout of the weight."""
        return Int8Layout(self.out_features, self.in_features)

    @property
    def int8(self) -> Int8Weight:
        """Return the weight, which shares memory with the layer."""
        return Int8Weight(*(cast(nn.Parameter, self._parameters[name]) for name in _PARTS))

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ plus the bias, (…, out), for x (…, in); under autocast, in its dtype."""
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return int8_linear(x, self.int8, self.bias)
        with torch.autocast(kind, enabled=False):  # the columns in floating point must not be rounded
            return int8_linear(x.to(torch.get_autocast_dtype(kind)), self.int8, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Apply a conversion to all tensors; the scales keep fp32, as the integers keep their dtype."""
        fixed = {id(self._parameters[name]) for name in _FP32_PARTS}

        def converted(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            is_rounded = id(tensor) in fixed and found.dtype != tensor.dtype
            return tensor.to(found.device) if is_rounded else found

        return super()._apply(converted, recurse)


def int8_matmul_linear(linear: nn.Module, gain: Tensor, kept: Tensor) -> Int8Linear:
    """Return a frozen int8 version of an `nn.Linear` or `Conv1D` of transformers, in the same mode.

    `gain` (in,) and `kept` (k,) are the result of `input_scales` in `lorakit.ops.int8_weight`; an `nn.Parameter` is
    shared.
    """
    is_conv1d = type(linear).__name__ == CONV1D
    held = cast(Tensor, linear.weight).detach()
    W = held.t() if is_conv1d else held
    weight = quantize_weight(W, gain.detach(), kept.detach())
    plain = nn.Linear(1, 1, bias=False, device="meta").train(linear.training)
    plain.out_features, plain.in_features = W.shape
    plain.register_parameter("bias", linear._parameters["bias"])
    made = cast(Int8Linear, packed_linear(Int8Linear, plain, {name: getattr(weight, name) for name in _PARTS}, {}))
    made._parameters["gain"], made._parameters["kept"] = frozen_parameter(gain), frozen_parameter(kept)
    if is_conv1d:
        made.__dict__[SOURCE] = type(linear)
    return made


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """Return a frozen parameter with the memory of a tensor, of any shape; a parameter is returned unchanged."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


class Int8Format(PackedFormat):
    """Format of an `Int8Linear`."""

    def write(self, module: PackedLinear, like: PackedWeight, canonical: Tensor) -> PackedWeight:
        """Quantize a weight (out, in), with the input scales and the kept channels of the stored weight `like`."""
        _, _, gain, kept, columns = like.parts
        made = quantize_weight(canonical.to(columns.device, torch.float32), gain.detach(), kept.detach())
        parts = (made.q, made.scale, gain, kept, made.columns.to(columns.dtype))
        return PackedWeight(tuple(frozen_parameter(part) for part in parts), like.layout)

    def dense(self, module: PackedLinear, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
        """Return a plain module with a weight (out, in) in the original dtype: a Conv1D if the layer replaced one."""
        return super().dense(module, canonical, cast(Int8Linear, module).columns.dtype)


INT8 = Int8Format("int8 matmul (W8A8)", ("lorakit.core.quantization.int8_linear.Int8Linear",), layer=Int8Linear)
