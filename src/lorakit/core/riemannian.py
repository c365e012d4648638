"""Riemannian preconditioning: each factor's gradient is multiplied by the damped inverse of the other's Gram matrix.

The preconditioner works with any optimizer of torch whose step uses `.grad`. It runs at the start of each step and
changes the gradients of A and B in place. This module does not depend on schedules, files or PEFT's names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lorakit.core.kinds.parameter import joined_A, joined_B, per_expert, split_A, split_B
from lorakit.core.linalg import damped_inverse
from lorakit.core.model.activation import trainable_parameters
from lorakit.core.model.index import find_state
from lorakit.core.optimizers import own_factors
from lorakit.core.quantization import at_least_fp32
from lorakit.errors import ConfigError, ConfigTypeError

DAMPING = 1e-2
"""Default of δ, as in PEFT."""


@dataclass(frozen=True)
class Factors:
    """The trained factors of one adapter at one site.

    A is (r, in) or, with E experts, (E·r, in), ordered by expert; B is (out, r) or (out, r·E), with the expert index
    varying fastest. `experts` is 1 for a single matrix.
    """

    A: nn.Parameter
    B: nn.Parameter
    experts: int = 1


def trained_factors(model: nn.Module, name: str | None = None) -> list[Factors]:
    """Return the pairs of A (r, in) and B (out, r) that can be preconditioned, of one adapter or all, in model order.

    A pair is left out if one of its factors is frozen or is not a matrix (convolutions), if it belongs to an embedding,
    or if A and B are stored with different ranks (a block-diagonal B).

    Raises:
        AdapterError: The model does not have the adapter.
    """
    trained = {id(parameter) for _, parameter in trainable_parameters(model, name)}
    return [
        Factors(A, B, max(1, layer.spec.experts))
        for _, layer, _, A, B in own_factors(model, name)
        if layer.kind.zero_side == "B" and id(A) in trained and id(B) in trained and A.ndim == B.ndim == 2
        if len(A) == B.shape[1]
    ]


@torch.no_grad()
def precondition(factors: Factors, damping: float) -> None:
    """Replace the gradients of A and B by g_A ← (Bᵀ·B + δ·I)⁻¹·g_A and g_B ← g_B·(A·Aᵀ + δ·I)⁻¹.   [docs/math.md (46)]

    A gradient that is None is left alone. The matmuls are computed in fp32 or wider; each expert has its own matrices.
    The damping δ keeps the inverse finite while a factor is zero.

    Source:
        Zhang and Pilanci 2024, arXiv:2402.02347, section 3.
    """
    experts, of_A, of_B = factors.experts, factors.A.grad, factors.B.grad
    A, B = per_expert(at_least_fp32(factors.A.detach()), at_least_fp32(factors.B.detach()), experts)
    if of_A is not None:
        of_A.copy_(joined_A(damped_inverse(B.mT, damping) @ split_A(at_least_fp32(of_A), experts)))
    if of_B is not None:
        of_B.copy_(joined_B(split_B(at_least_fp32(of_B), experts) @ damped_inverse(A, damping)))


def preconditioned(
    optimizer: type[Optimizer], model: nn.Module, *, lr: float, damping: float = DAMPING, **options: Any
) -> Optimizer:
    """Create an optimizer of this class that preconditions the gradients of A and B of a model at each step.

    All other parameters are updated with their own gradients. `options` are further arguments of the class, such as
    `weight_decay`. The optimizer's `step` accepts no closure.

    Raises:
        ConfigTypeError: `optimizer` is not an optimizer class.
        ConfigError: No site trains both A and B, δ is not a number >= 0, or the optimizer needs a closure.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise ConfigTypeError(
            f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer!r}.",
            what=optimizer,
            field="optimizer_cls",
        )
    if not math.isfinite(damping) or damping < 0:
        raise ConfigError.of("reg", damping, "a finite number >= 0")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        text = f"{optimizer.__name__} requires a closure, which would replace the gradients; use AdamW, for example."
        raise ConfigError(text, what=optimizer.__name__, field="optimizer_cls")
    pairs = [] if find_state(model) is None else trained_factors(model)
    if not pairs:
        text = "The model does not have any trainable lora_A/lora_B parameter pairs; attach or unfreeze an adapter."
        raise ConfigError(text, field="model")
    options = {"lr": lr, **options}
    instance = optimizer([p for p in model.parameters() if p.requires_grad], **options)
    instance.register_step_pre_hook(_before_step(pairs, damping))
    return instance


def _before_step(
    pairs: Sequence[Factors], damping: float
) -> Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]:
    def run(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):  # the first one is the optimizer
            text = "The preconditioned optimizer does not support closures; call backward() before step()."
            raise ConfigError(text, field="closure")
        for pair in pairs:
            precondition(pair, damping)

    return run
