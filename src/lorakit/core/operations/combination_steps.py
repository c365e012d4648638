"""The steps of the combination types: prune a tensor, weight tensors, elect signs, and average the values that agree.

`combination_types` composes these steps; `lorakit.peft.utils.merge_utils` offers them one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor (any shape) whose smallest values are set to zero.

    Args:
        tensor: The tensor, of any shape.
        density: Fraction of the values to keep, in [0, 1].
    """
    largest = tensor.abs().flatten().topk(int(density * tensor.numel()), sorted=False).indices
    kept = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device).index_fill(0, largest, True)
    return tensor * kept.view(tensor.shape)


def keep_random(
    tensor: Tensor, density: float, *, rescale: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Return a copy of a tensor (any shape) with a random part of its values set to zero.

    Args:
        tensor: The tensor, of any shape.
        density: Probability with which each value is kept, in [0, 1].
        rescale: Whether to divide the kept values by the density, which preserves the mean.
        generator: Random generator, or None for torch's default generator on the CPU.
    """
    chances = torch.full(tensor.shape, density, dtype=tensor.dtype)
    kept = tensor * torch.bernoulli(chances, generator=generator).to(tensor.device)
    return kept / density if rescale else kept


def weighted(stack: Tensor, weights: Tensor) -> Tensor:
    """Return stacked tensors (n, …), each multiplied by one of the weights (n,)."""
    return stack * weights.view(-1, *[1] * (stack.ndim - 1))


def has_elected_sign(stack: Tensor, majority: str) -> Tensor:
    """Return which values of stacked tensors (n, …) have the sign that is elected at their position.

    Args:
        stack: The stacked tensors, (n, …).
        majority: "total" elects the sign of the sum, "frequency" the sign that most values have; a tie elects +.

    Returns:
        Booleans, (n, …).
    """
    votes = (stack if majority == "total" else stack.sign()).sum(0)
    return stack.sign() == torch.where(votes >= 0, 1.0, -1.0).to(stack.dtype)


def mean_of_agreeing(stack: Tensor, agreeing: Tensor) -> Tensor:
    """Return the sum (…) of the values in stacked tensors (n, …) that agree, divided by their number or by 1.

    The division is in fp32 or wider.
    """
    return (stack * agreeing).sum(0) / agreeing.sum(0).clamp(min=1.0)
