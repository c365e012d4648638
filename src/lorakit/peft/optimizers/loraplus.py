"""LoRA+ as PEFT offers it: four groups of a model's trained tensors, handed to any optimizer class."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lorakit.core.optimizers.parameter_groups import roles

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer with a larger learning rate for B than for A (Hayou et al. 2024, arXiv:2402.12354).

    The groups are, in this order: A and copied matrices · both factors of embeddings · B and vectors · those of them
    that do not decay (biases, and what a LayerNorm holds). Empty groups stay, so that each has the same place always.

    Args:
        model: A model whose trained tensors have `requires_grad`.
        optimizer_cls: Such as `torch.optim.AdamW`.
        lr: Learning rate of A.
        loraplus_lr_ratio: Rate of B over that of A.
        kwargs: `loraplus_weight_decay` (0.0), `loraplus_lr_embedding` (1e-6); the rest goes to the optimizer.

    Returns:
        The optimizer.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    of_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, "lr": lr},
        {"params": [], "weight_decay": decay, "lr": of_embedding},
        {"params": [], "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    known = roles(model)
    normed = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = known.get(id(parameter), ("whole", ""))[0]
        if role == "embedding":
            group = 1
        elif role == "B" or parameter.ndim == 1:
            group = 3 if id(parameter) in normed or "bias" in name else 2
        else:
            group = 0
        groups[group]["params"].append(parameter)
    optimizer: Optimizer = optimizer_cls(groups, **{"lr": lr, **kwargs})
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_wide(model, optimizer_cls)
    return optimizer


def _keep_embeddings_wide(model: nn.Module, optimizer_cls: type[Optimizer]) -> None:
    """Tell bitsandbytes to keep the moments of embeddings in 32 bits; its own class was given, so it is loaded."""
    package: Any = sys.modules[optimizer_cls.__module__.partition(".")[0]]
    known = package.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            known.register_module_override(module, "weight", {"optim_bits": 32})
