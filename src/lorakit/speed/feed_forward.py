"""The recipes of feed-forward blocks: gated (SwiGLU, GeGLU) and plain, with adapters, dropout and norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.ops.activation import activation
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm
from lorakit.speed.linear import acting_in, forwards_of
from lorakit.speed.patching import AGAIN
from lorakit.speed.submodules import activation_of, is_usual, share_of, unknown_words

GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
FUSED = (("gate_up_proj", "down_proj"),)
"""The first gives gate and up side by side."""

PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("wi", "wo"))
LAST, WITHIN = ("c_fc",), ("wi", "wi_0")
"""Of blocks that begin with one of these, the child `dropout` is the last, or before the last linear module."""

ACTIVATION = ("act_fn", "activation_fn", "act")
WORDS = frozenset({"config", "hidden_size", "intermediate_size", "mlp_bias", "layer_idx", "embed_dim"})
"""Attributes of feed-forward modules that change nothing which a probe does not show."""


def fits(module: nn.Module) -> str | None:
    """Why a module is no feed-forward block that is known, or None where it is one."""
    names = _names(module)
    if names is None:
        return "not the children of a feed-forward block that is known"
    if activation_of(_activation(module)) is None:
        return f"its activation is {type(_activation(module)).__name__}"
    return unknown_words(module, WORDS, (*names, *ACTIVATION, "dropout"))


def run(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """The block's output for x (…, d), or None where the module's own forward has to run."""
    if args or kwargs:
        return None
    return feed_forward(module, x, None, residual=False)


def feed_forward(
    module: nn.Module, x: Any, norm: Norm | None, *, residual: bool, dropout: float = 0.0
) -> Tensor | None:
    """A feed-forward block with the norm before it and the residual after it.

    Args:
        module: A module that `fits`, or one that has such a block's parts beside others.
        x: Hidden states, (…, d).
        norm: The norm before it, or None.
        residual: Add x.
        dropout: Share of the block's output that is dropped behind it.

    Returns:
        (…, d), or None where the module's own forward has to run.
    """
    names, act = _names(module), activation_of(_activation(module))
    if names is None or act is None or not isinstance(x, Tensor) or not is_usual(x):
        return None
    shares = _shares(module, names, dropout)
    inside: list[nn.Module] = [module._modules[name] for name in names]  # type: ignore[misc]
    acting = None if shares is None else acting_in(inside, forwards_of(module), x)
    if acting is None or shares is None:
        return None
    *inner, down = acting.operands
    keep, fused = AGAIN not in module.__dict__, names in FUSED
    y = mlp(x, Form(tuple(inner), down, activation(act), norm, residual, *shares, fused=fused, keep=keep))
    acting.note(y)
    return y


def _shares(module: nn.Module, names: tuple[str, ...], behind: float) -> tuple[float, float] | None:
    """The shares of the output and of the inner numbers that are dropped now, or None where that is not known."""
    own = share_of(module._modules.get("dropout"))
    if own is None or own == 0:
        return None if own is None else (behind, 0.0)
    if names[0] in WITHIN:
        return behind, own
    return (own, 0.0) if names[0] in LAST and behind == 0 else None


def _names(module: nn.Module) -> tuple[str, ...] | None:
    for names in (*GATED, *FUSED, *PLAIN):
        if all(module._modules.get(name) is not None for name in names):
            return names
    return None


def _activation(module: nn.Module) -> Any:
    return next((getattr(module, name) for name in ACTIVATION if hasattr(module, name)), None)
