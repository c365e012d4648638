"""A convolution of several groups with adapters in it, as a convolution of one group.

Its adapters reach all input channels, which its own weight has no place for. In one group there is place, at the price
of a weight that is `groups` times as large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layering.layer import LoraLayer
from lorakit.core.variants import variant_named


def in_one_group(layer: LoraLayer, names: Sequence[str]) -> tuple[nn.Module, Tensor, Tensor]:
    """The convolution that does in one group what a site does with adapters merged.

    Args:
        layer: A site on a convolution of several groups.
        names: The adapters.

    Returns:
        The module, and as one group's weights (out, in, k…) the base's and the exact sum of updates.
    """
    kind, source = layer.kind, layer.source
    slot = dataclasses.replace(layer.slot, groups=1)
    shape = (slot.out_features, slot.in_features, *slot.kernel)
    W = kind.flat_weight(layer.slot, layer.read()).reshape(shape)
    total = torch.zeros_like(W)
    for name in names:
        factor = layer.factor(name)
        A, B = kind.flat(layer.slot, factor.A.to(W.dtype), factor.B.to(W.dtype))
        wide = dataclasses.replace(factor, A=A.view(-1, *shape[1:]), B=B.view(*B.shape, *[1] * len(slot.kernel)))
        delta = (B @ A).view(shape) * factor.scale
        total += variant_named(factor.variant).update(kind, slot, W, delta, wide)
    return _convolution(source, W + total), W, total


def _convolution(source: Any, W: Tensor) -> nn.Module:
    """A convolution that moves as another does, of one group, with the weight W (out, in, k…) and the other's bias."""
    moves = {name: getattr(source, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    made = nn.utils.skip_init(
        type(source), W.shape[1], W.shape[0], source.kernel_size, bias=False, device=W.device, **moves
    )
    made.weight = nn.Parameter(W.to(source.weight.dtype), requires_grad=source.weight.requires_grad)
    made.bias = source.bias
    return made.train(source.training)
