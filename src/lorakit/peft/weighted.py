"""Functions that combine and convert adapters, with PEFT's names and signatures.

`lorakit.core` combines adapters exactly even if they use rsLoRA, rank or alpha patterns, or DoRA, for which PEFT's
results have too large a scale, cannot be reloaded, or lack the magnitudes. `add_weighted_adapter` does not call the
functions on task tensors (`peft.utils.merge_utils`), which are composed of the core's combination steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.linalg import RankLimit
from lorakit.core.model.index import layers
from lorakit.core.operations.combination_types import (
    MAJORITIES,
    has_elected_sign,
    keep_largest,
    keep_random,
    mean_of_agreeing,
    weighted,
)
from lorakit.core.operations.reducing import plain_weights
from lorakit.core.operations.tensor_sources import AdapterWeights, weights_of_model
from lorakit.core.operations.writing import reader_of, write
from lorakit.errors import ConfigError, warn_caller
from lorakit.peft.model_adapters import check_exist, configs_of, set_adapter, user_model
from lorakit.tensor_headers import PREFIX


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Combine adapters into a new adapter, which is frozen and inactive.

    As in PEFT, a single adapter is scaled by its weight regardless of the combination type, and options that the type
    does not use are ignored. If the new name already exists, nothing is combined; PEFT returns silently, lorakit warns.

    Args:
        model: The `LoraModel` around the adapted model, or the model itself.
        adapters: Names of the adapters to combine.
        weights: One weight per adapter; negative weights subtract.
        adapter_name: Name of the new adapter.
        combination_type: One of `lorakit.core.COMBINATION_TYPES`.
        svd_rank: Rank of the result, for combination types that end in "svd".
        svd_clamp: Quantile beyond which values are clamped, for combination types that end in "svd".
        svd_full_matrices: Ignored; it does not affect the result.
        svd_driver: Driver for torch's SVD on CUDA devices.
        density: Fraction of the values that pruning keeps.
        majority_sign_method: How the majority sign is determined: "total" or "frequency".

    Raises:
        ConfigError: The combination type does not exist, requires a missing option, or cannot combine these ranks.
    """
    model = user_model(model)
    configs = configs_of(model)
    if adapter_name in configs:
        warn_caller(f"adapter {adapter_name!r} already exists, so nothing was combined. Choose another name.")
        return
    check_exist(configs, adapters, "does not exist")
    if combination_type not in core.COMBINATION_TYPES:
        text = f"Invalid combination_type: {combination_type}. Choose from {', '.join(core.COMBINATION_TYPES)}."
        raise ConfigError(text, what=combination_type, field="combination_type", allowed=core.COMBINATION_TYPES)
    if len(adapters) == 1 and not (svd_rank and combination_type.endswith("svd")):
        combination_type = "cat"  # exact, and keeps the adapter's rank
    options: dict[str, Any] = {"majority_sign": majority_sign_method}
    if combination_type not in ("svd", "linear", "cat"):
        if density is not None and density > 1:
            warn_caller(f"The density {density} is greater than or equal to 1, no pruning will be performed.")
        options["density"] = density if density is None else min(density, 1.0)
    if combination_type.endswith("svd"):
        options |= {"rank": svd_rank, "clamp": svd_clamp, "driver": svd_driver}
    core.combine(
        model, list(adapters), list(weights), adapter_name, way=core.CombinationType(combination_type, **options)
    )


def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Copy an adapter, weaken the copy's intruder dimensions, and activate the copy; the dtype is preserved.

    Args:
        peft_model: A `PeftModel`.
        old_adapter_name: Name of the original adapter, which is kept.
        new_adapter_name: Name of the new adapter.
        top_k: Number of top singular vectors of W + ΔW to compare with those of the base weight W.
        threshold_epsilon: Maximum cosine similarity of an intruder dimension to any singular vector of the base weight.
        mitigation_lambda: Fraction of each intruder dimension to keep.
        logging_sink: Function called with each log line, including one line per site; None disables logging.

    Raises:
        AdapterError: The adapter does not exist or uses DoRA, or the new name is taken.
        ConfigError: `top_k` is below 1.
    """
    log = logging_sink or (lambda line: None)
    model = user_model(peft_model)
    reduced = core.reduce_intruders(
        model, old_adapter_name, new_adapter_name, top=top_k, threshold=threshold_epsilon, keep=mitigation_lambda
    )
    for _, layer in layers(model):
        if new_adapter_name in layer.r:
            like = layer.factor(old_adapter_name).A.dtype
            for parameter in layer.parameters_of(new_adapter_name):
                parameter.data = parameter.data.to(like)
    for site in reduced:
        where = site.path if site.expert is None else f"{site.path}[{site.expert}]"
        log(f"{where}: Intruders: {len(site.indices)}" if site.indices else f"{where}: No intruders")
    log(f"Enabling new adapter {new_adapter_name}")
    set_adapter(model, new_adapter_name)


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter of any variant to LoRA with scale 1 and the given rank; the model is not modified.

    An int is the rank; a float in (0, 1] is the fraction of each site's squared Frobenius norm to keep. Returns the
    config, and the tensors (r, in) or (out, r) by name on disk, with PEFT's prefix only if the model is a `PeftModel`.
    """
    found = _converted(model, rank, adapter_name)
    prefix = PREFIX if user_model(model) is not model else ""
    return found.config, {prefix + name.removeprefix(PREFIX): tensor for name, tensor in found.tensors().items()}


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Convert an adapter with `convert_to_lora` and save it."""
    write(_converted(model, rank, adapter_name), path, replace=True)


def _converted(model: nn.Module, rank: int | float, adapter_name: str) -> AdapterWeights:
    if isinstance(rank, float) and not 0 < rank <= 1:
        text = f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        raise ConfigError(text, what=rank, field="rank")
    if rank == 0:
        raise ConfigError("Passing a rank of 0 doesn't make sense, please pass a valid value.", field="rank")
    inner = user_model(model)
    if not configs_of(inner):
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    loose = weights_of_model(inner, adapter_name)
    smallest = min(min(f.A[0].numel(), f.B.shape[0]) for f in loose.factors.values())
    if isinstance(rank, int) and rank > smallest:
        text = f"The chosen rank {rank} is larger than the weight shape ({smallest}), please choose a lower rank."
        raise ConfigError(text, what=rank, field="rank")
    if all(factor.variant.is_low_rank for factor in loose.factors.values()):
        warn_caller("Converting a PEFT adapter to LoRA that is already a LoRA adapter; its rank may change.")
    cut = RankLimit(energy=rank) if isinstance(rank, float) else RankLimit(rank=rank)
    return plain_weights(loose, cut, reader_of(inner))[0]


# ---- task tensors: n tensors of one shape (…); as in PEFT, signs are elected before the weights are applied

PRUNING_METHODS = ("magnitude", "random")
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
    if method not in PRUNING_METHODS:
        raise ConfigError.of("method", method, allowed=PRUNING_METHODS)
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
