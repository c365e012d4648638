"""The steps of the combination types: prune a tensor, weight tensors, elect signs, average the values that agree."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor (any shape) in which only the fraction `density` of the values, the largest, is not zero."""
    largest = tensor.abs().flatten().topk(int(density * tensor.numel()), sorted=False).indices
    kept = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device).index_fill(0, largest, True)
    return tensor * kept.view(tensor.shape)


def keep_random(
    tensor: Tensor, density: float, *, rescale: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Return a tensor (any shape) in which each value is kept with the probability `density`, and others are zero.

    `rescale` divides the kept values by the density, which preserves the mean. The generator is one of the CPU.
    """
    chances = torch.full(tensor.shape, density, dtype=tensor.dtype)
    kept = tensor * torch.bernoulli(chances, generator=generator).to(tensor.device)
    return kept / density if rescale else kept


def weighted(stack: Tensor, weights: Tensor) -> Tensor:
    """Return stacked tensors (n, …), each multiplied by one of the weights (n,)."""
    return stack * weights.view(-1, *[1] * (stack.ndim - 1))


def has_elected_sign(stack: Tensor, majority: str) -> Tensor:
    """Return which values of stacked tensors (n, …) have the sign that is elected at their position, as booleans (n,
    …).

    "total" elects the sign of the sum, "frequency" the sign that most values have; a tie elects +.
    """
    votes = (stack if majority == "total" else stack.sign()).sum(0)
    return stack.sign() == torch.where(votes >= 0, 1.0, -1.0).to(stack.dtype)


def mean_of_agreeing(stack: Tensor, agreeing: Tensor) -> Tensor:
    """Return the sum (…) of the agreeing values in (n, …), divided by their number or by 1, in fp32 or wider."""
    return (stack * agreeing).sum(0) / agreeing.sum(0).clamp(min=1.0)
