"""AdamW and LoRA-FA over the trainable tensors, their rates, clipping, and their state as named tensors.

The state is kept by parameter name, so that a checkpoint says which moment belongs to which tensor. Knows nothing about
models, steps or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorakit.core.optimizers.lorafa import LoraFA, Pair
from lorakit.errors import RunError
from lorakit.train.flat import MOMENTS, FlatAdamW, fits

Named = Sequence[tuple[str, nn.Parameter]]
"""Trainable tensors with their names in the model."""

_FUSED_DEVICES = ("cpu", "cuda", "mps")
_EPSILON = 1e-6  # torch's own, in `clip_grads_with_norm_`


def adamw(
    named: Named, learning_rate: float, weight_decay: float, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it; only matrices decay, since a magnitude or bias has no reason to shrink.
    [docs/math.md (16)]

    Tensors that can lie in one buffer are laid into one: their numbers stay, and so do the bits of a step. Make the
    optimizer after the model is where and as it will be trained.

    Args:
        named: The trainable tensors.
        learning_rate: The first rate; the loop sets it anew before each step.
        weight_decay: Share of a matrix's value, times the rate, taken away each step.
        rates: Name of a tensor -> its peak rate, where that is not `learning_rate`'s.

    Returns:
        The optimizer, without state.

    Raises:
        RunError: There is nothing to train.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101; betas 0.9 and 0.999, eps 1e-8.
    """
    groups = _groups(named, learning_rate, weight_decay, rates or {})
    if fits([parameter for _, parameter in named]):
        return FlatAdamW(groups, lr=learning_rate)
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for _, p in named)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def lorafa(
    named: Named,
    pairs: Sequence[Pair],
    learning_rate: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> LoraFA:
    """LoRA-FA with the groups that `adamw` would have.

    Args:
        named: The trainable tensors, after `lorakit.core.optimizers.lorafa.freeze_factors`.
        pairs: What that gave.
        learning_rate: The first rate; the loop sets it anew before each step.
        weight_decay: Share of a matrix's value, times the rate, taken away each step.
        rates: Name of a tensor -> its peak rate, where that is not `learning_rate`'s.

    Returns:
        The optimizer, without state.

    Raises:
        RunError: There is nothing to train.
    """
    return LoraFA(_groups(named, learning_rate, weight_decay, rates or {}), pairs, lr=learning_rate)


def _groups(
    named: Named, learning_rate: float, weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Tensors by rate and decay; `share` is a group's peak rate over the run's."""
    if not named:
        raise RunError("There is nothing to train: the model has no trainable tensor.")
    gathered: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        key = (rates.get(name, learning_rate) / learning_rate, weight_decay if parameter.ndim > 1 else 0.0)
        gathered.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": share * learning_rate, "share": share, "weight_decay": decay}
        for (share, decay), members in gathered.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its share of the run's learning rate: one schedule for all, each at its own height."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The common 2-norm of all gradients, a scalar; 0 where there is none.

    Args:
        parameters: Tensors (…); those without a gradient are skipped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: torch.Tensor, max_norm: float
) -> None:
    """Take a step with gradients that are scaled so that their common 2-norm is at most `max_norm`.

    Args:
        optimizer: From `adamw` or `lorafa`. One over flat buffers scales in the pass that steps.
        parameters: The tensors (…) that it trains; `.grad` is scaled or left as it is.
        norm: What `gradient_norm` gave, a scalar.
        max_norm: The largest norm; 0 scales nothing.

    Raises:
        RunError: A tensor is not what it was when the optimizer was made; nothing has changed.
    """
    if isinstance(optimizer, FlatAdamW):
        factor = torch.clamp(max_norm / (norm + _EPSILON), max=1.0).item() if max_norm > 0 else 1.0
        optimizer.step(factor=factor)
        return
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
    optimizer.step()


def state_tensors(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, torch.Tensor]:
    """The optimizer's state under names, ready for a file.

    Args:
        optimizer: From `adamw` or `lorafa`.
        named: The tensors that it trains.

    Returns:
        "exp_avg/<name>", "exp_avg_sq/<name>" (shape of the tensor) and "step/<name>" (scalar), on the CPU.
        A tensor that never had a gradient has no state and no entry.
    """
    tensors = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, named: Named, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` gave.

    Args:
        optimizer: A fresh optimizer over the same tensors.
        named: The tensors that it trains.
        tensors: State by name.

    Raises:
        RunError: A name or shape does not fit; nothing has been put back then.
    """
    shapes = {name: parameter.shape for name, parameter in named}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        wanted = shapes.get(name)
        if wanted is None or kind not in (*MOMENTS, "step") or (kind in MOMENTS and value.shape != wanted):
            raise RunError(
                f"The optimizer state {key} of shape {tuple(value.shape)} does not fit this model's adapter."
            )
    for name, parameter in named:
        state = {kind: tensors[f"{kind}/{name}"] for kind in ("step", *MOMENTS) if f"{kind}/{name}" in tensors}
        if state:
            optimizer.state[parameter] = {key: value.to(parameter.device).clone() for key, value in state.items()}
