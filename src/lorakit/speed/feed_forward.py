"""The recipes of feed-forward blocks: gated (SwiGLU, GeGLU) and plain, adapters and norm included."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.ops.mlp import gated, plain
from lorakit.ops.norm import Norm
from lorakit.speed.operands import acting_in, forwards_of
from lorakit.speed.parts import activation_of, is_usual, share_of, unknown_words

GATED = ("gate_proj", "up_proj", "down_proj")
PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
DROPPED = ("c_fc",)
"""Of blocks that begin with one of these, the child `dropout` is the last, and after nothing else."""

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


def feed_forward(module: nn.Module, x: Any, norm: Norm | None, *, residual: bool) -> Tensor | None:
    """A feed-forward block with the norm before it and the residual after it.

    Args:
        module: A module that `fits`.
        x: Hidden states, (…, d).
        norm: The norm before it, or None.
        residual: Add x.

    Returns:
        (…, d), or None where the module's own forward has to run.
    """
    names, act = _names(module), activation_of(_activation(module))
    if names is None or act is None or not isinstance(x, Tensor) or not is_usual(x):
        return None
    p = share_of(module._modules.get("dropout"))
    if p is None or (p > 0 and names[0] not in DROPPED):
        return None
    inside: list[nn.Module] = [module._modules[name] for name in names]  # type: ignore[misc]
    acting = acting_in(inside, forwards_of(module), x)
    if acting is None:
        return None
    operands = acting.operands
    if len(operands) == 3:
        y = gated(x, norm, operands[0], operands[1], operands[2], act, residual)
    else:
        y = plain(x, norm, operands[0], operands[1], act, residual, p)
    acting.note(y)
    return y


def _names(module: nn.Module) -> tuple[str, ...] | None:
    for names in (GATED, *PLAIN):
        if all(module._modules.get(name) is not None for name in names):
            return names
    return None


def _activation(module: nn.Module) -> Any:
    return next((getattr(module, name) for name in ACTIVATION if hasattr(module, name)), None)
