"""Kinds for convolutions: nn.Conv1d, nn.Conv2d, and nn.Conv3d.

A is a convolution from all input channels to r channels, with the base's stride, padding, padding mode and dilation; B
is a pointwise convolution with as many groups as the base. Both have PEFT's layout: A (r, in, k…),
B (out, r / groups, 1…). With more than one group, the delta also covers input channels for which the base weight has no
entries, so the weight can hold the delta only after the convolution has been expanded to one group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.kinds.kind import LINEAR, Shape, WeightSpec
from lorakit.errors import ConfigError, MergeError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


def _specs(module: Convolution) -> tuple[WeightSpec, ...]:
    spec = WeightSpec(
        "weight", module.out_channels, module.in_channels, kernel=module.kernel_size, groups=module.groups
    )
    return (spec,)


def _shapes(spec: WeightSpec, r: int) -> tuple[Shape, Shape]:
    if r % spec.groups:
        text = f"The rank is {r}, but a convolution with {spec.groups} groups needs a rank divisible by {spec.groups}."
        raise ConfigError(text, what=r, field="r")
    point = (1,) * len(spec.kernel)
    return (r, spec.in_features, *spec.kernel), (spec.out_features, r // spec.groups, *point)


def _down(module: Convolution, x: Tensor, A: Tensor) -> Tensor:
    padding: str | tuple[int, ...] | int = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    convolve = _CONVOLVE[A.ndim - 3]
    return convolve(x, A, None, module.stride, padding, module.dilation)  # (N, in, …) -> (N, r, …)


def _up(module: Convolution, h: Tensor, B: Tensor) -> Tensor:
    return _CONVOLVE[B.ndim - 3](h, B, groups=module.groups)  # (N, r, …) -> (N, out, …)


def _flat(spec: WeightSpec, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.flatten(1), _in_one_group(B.flatten(1), spec)


def _flat_weight(spec: WeightSpec, W: Tensor) -> Tensor:
    return _in_one_group(W, spec).flatten(1)


def _in_one_group(W: Tensor, spec: WeightSpec) -> Tensor:
    """Expand a grouped weight (out, in / groups, …) to (out, in, …), with zeros for the inputs of other groups."""
    if spec.groups == 1:
        return W
    groups, inside = spec.groups, W.shape[1]
    wide = W.new_zeros(W.shape[0], groups, *W.shape[1:])
    group_of = torch.arange(W.shape[0], device=W.device) // (W.shape[0] // groups)
    wide[torch.arange(W.shape[0], device=W.device), group_of] = W
    return wide.view(W.shape[0], groups * inside, *W.shape[2:])


def _delta(spec: WeightSpec, A: Tensor, B: Tensor) -> Tensor:
    """Return the delta B·A (out, in, k…), computed from A (r, in, k…) and B (out, r, 1…), of one group."""
    if spec.groups > 1:
        text = f"The weight of a convolution with {spec.groups} groups cannot store an update; merge with dense=True."
        raise MergeError(text, what=str(spec.groups))
    A, B = _flat(spec, A, B)
    return (B @ A).view(spec.out_features, spec.in_features, *spec.kernel)


def _vector(spec: WeightSpec) -> Shape:
    return (1, spec.out_features, *[1] * len(spec.kernel))


CONV1 = replace(
    LINEAR,
    name="Conv1d",
    types=(nn.Conv1d,),
    specs=_specs,
    shapes=_shapes,
    vector=_vector,
    down=_down,
    up=_up,
    flat=_flat,
    flat_weight=_flat_weight,
    delta=_delta,
    is_dense=False,
)
CONV2 = replace(CONV1, name="Conv2d", types=(nn.Conv2d,))
CONV3 = replace(CONV1, name="Conv3d", types=(nn.Conv3d,))
