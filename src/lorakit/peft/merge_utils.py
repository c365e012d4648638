"""PEFT's functions for combining task tensors (`peft.utils.merge_utils`), composed of the core's combination steps.

Task tensors are n tensors of one shape (…). `density` is the fraction of the values to keep, or the probability of
keeping one. Unlike in `add_weighted_adapter`, signs are elected before the weights are applied, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.core.operations.combination_types import (
    MAJORITIES,
    has_elected_sign,
    keep_largest,
    keep_random,
    mean_of_agreeing,
    weighted,
)
from lorakit.errors import ConfigError, warn_caller

METHODS = ("magnitude", "random")
"""Ways to select the values that pruning keeps."""


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """Return a pruned tensor of any shape, or the tensor itself, with a warning, if the density is 1 or more.

    Raises:
        ConfigError: The density is negative, or the method is unknown.
    """
    if density >= 1:
        warn_caller(f"The density {density} is greater than or equal to 1, no pruning will be performed.")
        return tensor
    if density < 0:
        raise ConfigError.of("density", density, "a fraction of at least 0")
    if method not in METHODS:
        raise ConfigError.of("method", method, allowed=METHODS)
    return keep_random(tensor, density, rescale=rescale) if method == "random" else keep_largest(tensor, density)


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Return which values of stacked task tensors (n, …) have the sign that is elected at their position, (n, …).

    Raises:
        ConfigError: The method is unknown.
    """
    if method not in MAJORITIES:
        raise ConfigError.of("method", method, allowed=MAJORITIES)
    return has_elected_sign(tensor, method)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Return the mean (…) of the values of stacked task tensors (n, …) that a mask (n, …) selects."""
    return mean_of_agreeing(task_tensors, majority_sign_mask)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum (…) of n task tensors; the weights are (n,)."""
    return weighted(torch.stack(list(task_tensors)), weights).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the weighted sum (…) of the largest values of n task tensors; the weights are (n,)."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the weighted sum (…) of n randomly pruned and rescaled task tensors; the weights are (n,)."""
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Return the mean (…) of the largest values of n task tensors that have the elected signs, weighted by (n,)."""
    return _elected([prune(tensor, density, "magnitude") for tensor in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Return the mean (…) of randomly pruned and rescaled values that have the elected signs, weighted by (n,)."""
    pruned = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _elected(pruned, weights, majority_sign_method)


def _elected(pruned: Sequence[Tensor], weights: Tensor, method: str) -> Tensor:
    stack = torch.stack(list(pruned))
    return mean_of_agreeing(weighted(stack, weights), calculate_majority_sign_mask(stack, method))
