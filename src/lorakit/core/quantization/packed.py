"""`PackedLinear`: a frozen linear layer that stores its weight in packed tensors and dequantizes it in each pass.

The backward pass dequantizes the weight again, so autograd keeps only the packed tensors. The weight is decoded in fp32
and then rounded to the dtype of the input. The files next to this one define the layouts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from lorakit.core.quantization.weight_format import Packed, WeightFormat
from lorakit.errors import MergeError, ModelError

Setting = int | tuple[int, int] | None
"""A setting of a packed layer, such as its number of bits."""


@dataclass(frozen=True)
class PackedLayout:
    """The layout of a packed weight with the size (rows, columns), (out, in)."""

    rows: int
    columns: int

    @abstractmethod
    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return the weight (out, in) in fp32, from the tensors in the order of `PackedLinear.PARTS`."""

    def values(self, parts: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,), and bounds (n,) on their quantization errors, for positions (n,) in the
        flattened weight.

        The default bound is infinite, because methods such as GPTQ do not round to the nearest value.
        """
        values = self.decode(parts).reshape(-1)[positions.to(parts[0].device)]
        return values, torch.full_like(values, torch.inf)


def spread(scales: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Return scales (rows/block, columns/block) in fp32, repeated for every value that shares them, (rows, columns).

    The last block of a row or column may be smaller.
    """
    wide = scales.float().repeat_interleave(block[0], 0)[:rows]
    return wide.repeat_interleave(block[1], 1)[:, :columns]


@dataclass(frozen=True)
class PackedWeight(Packed):
    """A packed weight: its tensors, in the order of `PackedLinear.PARTS`, and their layout."""

    parts: tuple[Tensor, ...]
    layout: PackedLayout

    def decoded(self) -> Tensor:
        """Return the dequantized weight, (out, in), in fp32, without an autograd graph."""
        return self.layout.decode(tuple(part.detach() for part in self.parts))


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight consists of several packed tensors.

    Attributes:
        PARTS: Names of the parameters that make up the weight; the first holds the values. An optional parameter may
            be None.
        OPTIONAL: Names in `PARTS` whose parameters may be None.
        bias: Bias (out,), or None.
        BITS: Numbers of bits per value that the layout supports.
    """

    BITS: ClassVar[tuple[int, ...]] = (8,)
    PARTS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @property
    @abstractmethod
    def layout(self) -> PackedLayout:
        """Return the layout of the packed tensors."""

    def packed(self) -> PackedWeight:
        """Return the packed weight, which shares memory with the layer."""
        parts = (self._parameters[name] for name in self.PARTS)
        return PackedWeight(tuple(part for part in parts if part is not None), self.layout)

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ plus the bias, (…, out), for x (…, in)."""
        return packed_product(x, self.packed(), self.bias)

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def packed_linear(
    kind: type[PackedLinear], linear: nn.Linear, parts: Mapping[str, Tensor], settings: Mapping[str, Setting]
) -> PackedLinear:
    """Return a packed layer with the sizes, the bias and the mode (training or eval) of a dense layer.

    `parts` are the parameters in `kind.PARTS` that are not None; `settings` are further attributes, such as `bits`.
    """
    packed = kind()
    packed.in_features, packed.out_features = linear.in_features, linear.out_features
    vars(packed).update(settings)
    for name in kind.PARTS:
        part = parts.get(name)
        packed.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))
    bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    packed.register_parameter("bias", bias)
    return packed.train(linear.training)


def packed_product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x·Wᵀ plus a bias (out,), (…, out), for x (…, in), without keeping W for the backward pass."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        y: Tensor = _Product.apply(x, weight.layout, *weight.parts)
        return y if bias is None else y + bias.to(y.dtype)
    return F.linear(x, weight.decoded().to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Product(torch.autograd.Function):
    """x·Wᵀ for a packed weight W; only the packed tensors are saved for the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layout: PackedLayout, *parts: Tensor) -> Tensor:
        """Return x·Wᵀ, (…, out), for x (…, in)."""
        ctx.layout, ctx.dtype = layout, x.dtype  # type: ignore[attr-defined]
        ctx.save_for_backward(*parts)
        return F.linear(x, layout.decode(parts).to(x.dtype))

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x, (…, in), and None for all other arguments."""
        parts: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        (gradient,) = gradients
        W = ctx.layout.decode(parts).to(gradient.dtype)  # type: ignore[attr-defined]
        return (gradient @ W).to(ctx.dtype), None, *[None for _ in parts]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class PackedFormat(WeightFormat[PackedLinear, PackedWeight]):
    """Format of a `PackedLinear`. lorakit reads the weight, but cannot quantize a new one in the same way.

    Attributes:
        layer: The class with the names of the packed tensors; modules of `types` may be of another class.
    """

    layer: type[PackedLinear] = PackedLinear  # type: ignore[type-abstract]

    def stored(self, module: PackedLinear, parameter: str) -> PackedWeight:
        """Return the packed tensors of a layer."""
        return module.packed()

    def read(self, module: PackedLinear, stored: PackedWeight) -> Tensor:
        """Return the dequantized weight, (out, in), in fp32."""
        return stored.decoded()

    def write(self, module: PackedLinear, like: PackedWeight, canonical: Tensor) -> PackedWeight:
        """Raise a MergeError, instead of writing a new weight (out, in)."""
        text = f"lorakit does not write {self.name} weights; use merge(model, dense=True), or dequantize the base."
        raise MergeError(text, what=self.name, field="dense")

    def put_stored(self, module: PackedLinear, parameter: str, stored: PackedWeight) -> None:
        """Write packed tensors to a layer."""
        for name, part in zip(self.part_names(module), stored.parts, strict=True):
            module._parameters[name] = part  # type: ignore[assignment]

    def part_names(self, module: PackedLinear) -> tuple[str, ...]:
        """Return the names of the parameters that hold the packed tensors."""
        return tuple(name for name in self.layer.PARTS if module._parameters.get(name) is not None)

    def tensors(self, stored: PackedWeight) -> tuple[Tensor, ...]:
        """Return the packed tensors, of any shape, starting with the values."""
        return stored.parts

    def values(self, stored: PackedWeight, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,), and bounds (n,) on their quantization errors."""
        return stored.layout.values(tuple(part.detach() for part in stored.parts), positions)

    def check(self, module: PackedLinear, path: str) -> None:
        """Check that all packed tensors are present and fit the layer, and that floating-point ones are finite.

        Raises:
            ModelError: A tensor is missing, has another shape, or has NaN or infinite values.
        """
        for name in self.layer.PARTS:
            part = module._parameters.get(name)
            if part is None and name in self.layer.OPTIONAL:
                continue
            if part is None:
                text = f"{path}.{name} is missing from the {self.name} weight; load the model from complete files."
                raise ModelError(text, what=name, where=path, field=name)
            if part.is_floating_point() and not part.is_meta and not bool(torch.isfinite(part.float()).all()):
                text = f"{path}.{name} has NaN or infinite values; load the {self.name} weight from undamaged files."
                raise ModelError(text, what="not finite", where=path, field=name)
        for name in self.part_names(module):
            shape = tuple(cast(Tensor, module._parameters[name]).shape)
            if not self.fits(module, name, shape):
                text = (
                    f"{path}.{name} has shape {shape}, which does not fit a {self.name} weight with "
                    f"{module.out_features} outputs and {module.in_features} inputs. Check the model's config."
                )
                raise ModelError(text, what=shape, where=path, field=name)

    def fits(self, module: PackedLinear, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a packed tensor of this name may have this shape; the default accepts any."""
        return True
