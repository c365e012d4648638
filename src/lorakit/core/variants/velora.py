"""VeLoRA: LoRA whose backward pass reads a compressed copy of A's input instead of the input itself.

The output is that of LoRA. In training, each input row is split into groups, and only the length of each group along
one common direction is kept for the gradient of A. The direction, here called the projection, is the mean of the groups
or random. It is saved with the adapter but never trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.kinds.kind import Kind, Shape, WeightSpec, only_dense
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants.variant import Factor, OwnTensor, Parts, Setting, Start, Variant, values_of

PROJECTION = "lora_velora_embed"
"""PEFT's name for the projection, on a layer and on disk."""


def grouped(x: Tensor, num_groups: int) -> Tensor:
    """Split each row of x (…, in) into n groups of width d = ⌈in / n⌉, (rows, n, d), padded with zeros at the end."""
    missing = -x.shape[-1] % num_groups
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, num_groups, (x.shape[-1] + missing) // num_groups)


def compressed(x: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """Return the length of each group of x (…, in) along the direction v (d,) of length 1, (rows, n), in x's dtype."""
    return grouped(x, num_groups) @ v.to(x.dtype)


def unit(direction: Tensor) -> Tensor:
    """Return a vector (d,) divided by its length, in fp32 or wider; a vector of zeros counts as one of ones."""
    wide = at_least_fp32(direction)
    wide = torch.where(wide.any(), wide, torch.ones_like(wide))
    return wide / torch.linalg.vector_norm(wide)


def compressed_linear(x: Tensor, A: Tensor, v: Tensor, groups: int, strength: float) -> Tensor:
    """Return `CompressedLinear` of x (…, in), A (r, in) and v (d,), for n groups and the factor σ of A's gradient."""
    y: Tensor = CompressedLinear.apply(x, A, v, compressed(x, v, groups), strength)
    return y


class CompressedLinear(torch.autograd.Function):
    """A·x (…, r), with a gradient of A that is computed from the compressed input.   [docs/math.md (101)]

    The gradient of x is exact. That of A is σ·gᵀ·x̂ with x̂ = (x·v)·vᵀ per group: its r × n sums over the rows are
    multiplied by v only at the end, so x̂ is never formed. The n values per row that are saved are an argument, so that
    the gradients can be differentiated again.

    Source:
        Miles et al. 2024, arXiv:2405.17991, section 3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, lengths: Tensor, strength: float) -> Tensor:
        """Return A·x, (…, r), for A (r, in), v (d,), the compressed input `lengths` (rows, n), and σ as `strength`."""
        ctx.save_for_backward(lengths, A, v)
        ctx.strength = strength
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients of x (…, in) and A (r, in) for the gradient g (…, r) of the output."""
        lengths, A, v = ctx.saved_tensors  # (rows, n), (r, in), (d,)
        of_x = of_A = None
        if ctx.needs_input_grad[0]:
            of_x = g @ A
        if ctx.needs_input_grad[1]:
            sums = g.reshape(-1, g.shape[-1]).T @ lengths  # (r, n)
            whole = sums[..., None] * (v * ctx.strength).to(sums.dtype)  # (r, n, d)
            of_A = whole.flatten(1)[:, : A.shape[1]]
        return of_x, of_A, None, None, None


def _shape(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> Shape:
    return (-(-spec.in_features // int(setting["num_groups"])),)


def _start(start: Start) -> Tensor:
    (width,) = _shape(start.kind, start.spec, start.rank, start.setting)
    new = start.A.new_zeros(width)
    return new if start.setting["init_type"] != "random" else unit(new.normal_(generator=start.generator)).to(new.dtype)


def _projection(x: Tensor, factor: Factor) -> Tensor:
    """Return the projection (d,) for an input (…, in), after updating the stored one if the setting requires it."""
    stored, init = factor.own[PROJECTION], factor.setting["init_type"]
    if init == "random" or (init == "batch_average_once" and bool(stored.any())):
        return stored
    with torch.no_grad():
        new = unit(grouped(x.detach(), int(factor.setting["num_groups"])).mean((0, 1))).to(stored.dtype)
        stored.copy_(new)
    return new  # not the stored tensor, which the next forward pass may overwrite before this one's backward pass


def _down(kind: Kind, module: nn.Module, x: Tensor, factor: Factor, training: bool) -> Tensor:
    A = factor.A.to(x.dtype)
    if not training or not torch.is_grad_enabled():
        return kind.down(module, x, A)
    groups, strength = int(factor.setting["num_groups"]), float(factor.setting["scale"])
    return compressed_linear(x, A, _projection(x, factor), groups, strength)


VELORA = Variant(
    name="velora",
    title="VeLoRA",
    field="velora_config",
    setting=values_of("velora_config"),
    fits=only_dense,
    parts=Parts(
        extras=(
            OwnTensor(
                held_as=PROJECTION,
                carried="buffer",
                shape=_shape,
                start=_start,
                trained=False,
                depends_on_rank=False,
            ),
        )
    ),
    down=_down,
)
