"""Experts whose forward is known: A and B act on each expert's tokens, so that no dense weight is made.

transformers marks a class of fused experts with a decorator, and thereby states the whole of its forward in a few
attributes of the instance: which projections, their layout, biases, gate and norm. Where a module carries these
marks, the forward is written out here with the low-rank products beside each expert's own, and what an expert gets
can be dropped before A. Any other module with bare parameters runs with W₀ + B·A in its weights. Nothing of the
module or of its class is replaced; this file knows the marks, not the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.kinds import WeightSpec, per_expert
from lorakit.core.variants import Factor

MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "num_experts")
"""Attributes by which an instance states its forward."""

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertFactor:
    """One adapter at one parameter, taken apart by expert.

    Attributes:
        A: (experts, r, in).
        B: (experts, out, r).
        scale: The factor's scale.
        dropout: What an expert's tokens pass before A.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: nn.Module


def shows_tokens(module: nn.Module, parameter: str = "down_proj") -> bool:
    """Whether the forward of a module is known, so that factors can act on the tokens of each expert.

    Args:
        module: A module of the base.
        parameter: The parameter that is adapted.
    """
    if parameter not in PROJECTIONS or not all(hasattr(module, mark) for mark in MARKS):
        return False
    marked = callable(getattr(module, "_apply_gate" if module.has_gate else "act_fn", None))
    first = "gate_up_proj" if module.has_gate else "up_proj"
    held = [module._parameters.get(name) for name in (first, "down_proj")]
    return (
        marked
        and parameter in (first, "down_proj")
        and not getattr(module, "_is_expert_parallel", False)
        and all(weight is not None and weight.ndim == 3 and weight.is_floating_point() for weight in held)
    )


def expert_factor(slot: WeightSpec, factor: Factor) -> ExpertFactor:
    """A factor of fused experts, taken apart by expert.   [docs/math.md (92)]

    Args:
        slot: The parameter.
        factor: With A (experts·r, in) and B (out, r·experts).
    """
    A, B = per_expert(slot, factor.A, factor.B)
    return ExpertFactor(A, B, factor.scale, factor.dropout)


def experts_forward(
    module: Any,
    factors: Mapping[str, Sequence[ExpertFactor]],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The forward of marked experts, with the factors of the active adapters beside each projection.

    Args:
        module: The experts, with the weights that shall act.
        factors: Name of a parameter -> factors that act there.
        hidden_states: (tokens, d).
        top_k_index: Experts of each token, (tokens, k).
        top_k_weights: Their weights, (tokens, k).

    Returns:
        (tokens, d). Cost beside the base: 2·r·(in + out) FLOPs per token, expert and projection; no dense weight.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    result = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        position, token = torch.where(expert == top_k_index.T)
        h = _project(module, first, expert, hidden_states[token], factors.get(first, ()))
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        y = _project(module, "down_proj", expert, h, factors.get("down_proj", ()))
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * top_k_weights[token, position, None]
        result.index_add_(0, token, y.to(result.dtype))
    return result


def _project(module: Any, name: str, expert: int, x: Tensor, factors: Sequence[ExpertFactor]) -> Tensor:
    """One expert's projection of its tokens x (tokens, in), with the low-rank products: (tokens, out)."""
    W = getattr(module, name)[expert]
    y0 = F.linear(x, W.T if module.is_transposed else W)
    if module.has_bias:
        y0 = y0 + getattr(module, f"{name}_bias")[expert]
    y = y0
    for factor in factors:
        z = factor.dropout(x.to(y0.dtype))
        h = F.linear(z, factor.A[expert].to(y0.dtype)) * factor.scale  # (tokens, r): the small place to scale
        y = y + F.linear(h, factor.B[expert].to(y0.dtype))
    return y
