"""Weights in fp8 (float8_e4m3fn) with one scale per block, as DeepSeek publishes them.

transformers' `FP8Linear`, which lorakit does not import, needs kernels for accelerators. Where they cannot run,
`disable_repacking` gives the module the class `Fp8Linear`, whose forward pass dequantizes the weight; `allow_repacking`
restores the original class.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.quantization.packed import PackedFormat, PackedLinear, PackedWeight
from lorakit.core.quantization.packed_layouts import CompressedLayout
from lorakit.errors import MergeError

LARGEST = 448.0
"""The largest finite value of float8_e4m3fn."""

_HALF_STEP, _SMALLEST_HALF_STEP = 2.0**-4, 2.0**-10
"""Bounds on the rounding error of float8_e4m3fn, relative to the value, and for subnormals relative to the scale."""

_ACCELERATORS = frozenset({"cuda", "xpu"})
_ORIGINAL = "_class_without_kernels"


@dataclass(frozen=True)
class Fp8Layout(CompressedLayout):
    """An fp8 weight (out, in) and its scales; there is one scale if the block is None."""

    def encode(self, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a weight (out, in) in fp32, with the largest magnitude of each block at the largest fp8 value.

        The new scales have the shape and dtype of `scales`; in float8_e8m0fnu, they are rounded up to powers of two.
        """
        if self.block is None:
            largest = weight.abs().amax().reshape(scales.shape)
        else:
            rows, columns = self.block
            missing = (-weight.shape[0] % rows, -weight.shape[1] % columns)
            padded = nn.functional.pad(weight.abs(), (0, missing[1], 0, missing[0]))
            largest = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))
        new_scales = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
        if scales.dtype == getattr(torch, "float8_e8m0fnu", None):
            new_scales = torch.exp2(new_scales.log2().ceil())
        new_scales = new_scales.to(scales.dtype)
        values = (weight / self.spread(new_scales)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return values, new_scales

    def values(self, parts: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,), and bounds on their rounding errors (n,)."""
        codes, scales = parts
        positions = positions.to(codes.device)
        rows, columns = positions // self.columns, positions % self.columns
        if self.block is not None and scales.ndim == 2:
            steps = scales.float()[rows // self.block[0], columns // self.block[1]]
        else:
            steps = scales.float().reshape(()).expand(positions.shape)
        values = codes.reshape(-1).view(torch.uint8)[positions].view(codes.dtype).float() * steps
        return values, torch.maximum(_HALF_STEP * values.abs(), _SMALLEST_HALF_STEP * steps.abs())


class Fp8Linear(PackedLinear):
    """A linear layer with an fp8 weight, which runs on every device; its attributes are those of an `FP8Linear`.

    Attributes:
        weight: Values (out, in), in float8_e4m3fn.
        weight_scale_inv: Scales (out/block, in/block), or one scale.
        block_size: Rows and columns that share a scale, or None.
    """

    PARTS = ("weight", "weight_scale_inv")
    weight: nn.Parameter
    weight_scale_inv: nn.Parameter
    block_size: tuple[int, int] | None

    @property
    def layout(self) -> Fp8Layout:
        """Return the layout of the values and scales."""
        return layout_of(self)


def layout_of(module: Fp8Linear) -> Fp8Layout:
    """Return the layout of the weight of an `Fp8Linear` or an `FP8Linear`."""
    block = module.block_size
    rows, columns = module.weight.shape
    return Fp8Layout(int(rows), int(columns), None if block is None else (int(block[0]), int(block[1])))


class Fp8Format(PackedFormat):
    """Format of an fp8 weight with one scale per block."""

    def stored(self, module: PackedLinear, parameter: str) -> PackedWeight:
        """Return the values and scales of a layer."""
        parts = tuple(module._parameters[name] for name in self.layer.PARTS)
        return PackedWeight(parts, layout_of(module))  # type: ignore[arg-type]

    def write(self, module: PackedLinear, like: PackedWeight, canonical: Tensor) -> PackedWeight:
        """Quantize a weight (out, in), with new scales in the shape and dtype of the current ones."""
        values, scales = like.parts
        layout: Fp8Layout = like.layout  # type: ignore[assignment]
        encoded = layout.encode(canonical.to(values.device, torch.float32), scales)
        return PackedWeight(tuple(nn.Parameter(part, requires_grad=False) for part in encoded), layout)

    def disable_repacking(self, module: PackedLinear) -> bool:
        """Give a module the class `Fp8Linear` if the kernels that its own forward pass needs cannot run here."""
        if isinstance(module, Fp8Linear) or type(module).__name__ != "FP8Linear" or _has_kernels(module):
            return False
        module.__dict__[_ORIGINAL] = type(module)
        module.__class__ = Fp8Linear
        return True

    def allow_repacking(self, module: PackedLinear) -> None:
        """Restore the class of a module."""
        module.__class__ = module.__dict__.pop(_ORIGINAL)


class Fp8ExpertsFormat(PackedFormat):
    """Format of transformers' fused experts in fp8, which lorakit does not read; adapters on them are rejected."""

    def check(self, module: PackedLinear, path: str) -> None:
        """Check nothing: a site with this format is rejected anyway."""

    def stored(self, module: PackedLinear, parameter: str) -> PackedWeight:
        """Raise a MergeError."""
        text = f"lorakit does not read {self.name} ({parameter}); load a dense copy with lorakit.hub.load_model."
        raise MergeError(text, what=self.name, field=parameter)


def _has_kernels(module: nn.Module) -> bool:
    """Return whether the kernels of transformers can run a module."""
    on_accelerator = all(p.device.type in _ACCELERATORS for p in module._parameters.values() if p is not None)
    return on_accelerator and importlib.util.find_spec("kernels") is not None


FP8 = Fp8Format(
    "fp8 with block scales",
    ("lorakit.core.quantization.fp8.Fp8Linear", "transformers.integrations.finegrained_fp8.FP8Linear"),
    layer=Fp8Linear,
)

FP8_EXPERTS = Fp8ExpertsFormat(
    "fp8 experts",
    ("transformers.integrations.finegrained_fp8.FP8Experts",),
    parameters=("gate_up_proj", "up_proj", "down_proj"),
)
