"""Inits that use neither data nor the base weight: Kaiming, Gaussian, fully random, and orthogonal (B·A is zero)."""

from __future__ import annotations

import math

import torch

from lorakit.core.inits.init import Init, InitContext, InitResult, fresh_bias, normal, uniform, zeros
from lorakit.core.kinds.kind import every_kind


def _kaiming(context: InitContext) -> InitResult:
    """Fill one factor with uniform values within ±1/√fan_in (standard normal for an embedding); set the other to zero.

    [docs/math.md (5), (6)]

    Source: He et al. 2015 with a = √5, as in nn.Linear; Hu et al. 2021, section 4.1.
    """
    if context.kind.zero_side == "A":
        return InitResult(zeros(context, context.A_shape), normal(context, context.B_shape, 1.0))
    return InitResult(uniform(context, context.A_shape), zeros(context, context.B_shape))


def _gaussian(context: InitContext) -> InitResult:
    """Fill one factor with normal values (standard deviation 1/r), and set the other to zero.   [docs/math.md (5)]

    As in PEFT, an embedding is initialized as by the default init.
    """
    if context.kind.zero_side == "A":
        return _kaiming(context)
    return InitResult(normal(context, context.A_shape, 1.0 / context.r), zeros(context, context.B_shape))


def _random(context: InitContext) -> InitResult:
    """Fill both factors randomly, so that a new adapter changes the output; meant for tests and experiments."""
    if context.kind.zero_side == "A":
        return InitResult(normal(context, context.A_shape, 1.0), normal(context, context.B_shape, 1.0))
    return InitResult(uniform(context, context.A_shape), uniform(context, context.B_shape))


KAIMING = Init(True, _kaiming, fits=every_kind, takes_any_shape=True, draws_again=True)
GAUSSIAN = Init("gaussian", _gaussian, fits=every_kind, takes_any_shape=True, draws_again=True)
RANDOM = Init(False, _random, fits=every_kind, is_identity=False, takes_any_shape=True)


def discard_first_draws(context: InitContext) -> None:
    """Draw the values that PEFT's modules, on the CPU, get for A and B before initialization (`Init.draws_again`)."""
    if context.device.type == "cpu":
        _random(context)
        if context.config.lora_bias:
            fresh_bias(context, random=True)


SIZE = 0.1
"""Standard deviation of the random coefficients X and Y in the orthogonal init."""


def _orthogonal(context: InitContext) -> InitResult:
    """Set A = Q₁ᵀ·X/10 and B = Y·Q₂/10, where X and Y are random matrices.   [docs/math.md (63)]

    The odd rows of a random orthogonal matrix form Q₁, and the even rows form Q₂.

    Both factors receive gradients from the first step onward.

    Source:
        datta0.github.io/posts/rethink-lora-init, as in PEFT.
    """
    if context.r % 2:
        raise context.error(f"Orthogonal initialization requires the LoRA rank to be even, got {context.r} instead.")
    context.check_ungrouped()
    g, out = max(context.spec.experts, 1), context.spec.out_features
    n = math.prod(context.A_shape[1:])

    def random(*shape: int) -> torch.Tensor:
        return normal(context, (g, *shape), 1.0)

    Q = torch.linalg.qr(random(context.r, context.r)).Q
    odd, even = Q[:, 0::2], Q[:, 1::2]  # (g, r / 2, r)
    half = context.r // 2
    return InitResult(*context.in_layout(odd.mT @ random(half, n) * SIZE, random(out, half) @ even * SIZE))


ORTHOGONAL = Init("orthogonal", _orthogonal, is_exact=False)
