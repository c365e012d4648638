"""Fused feed-forward blocks, either gated (SwiGLU, GeGLU) or plain, with adapters, dropout and a norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.ops.activation import activation
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm
from lorakit.speed.linear import active_operands, forwards_of
from lorakit.speed.norm import dropout_p
from lorakit.speed.patching import RECOMPUTES, Options, modules_at
from lorakit.speed.submodules import (
    activation_of,
    is_activation_watched,
    unknown_activation,
    unknown_attributes,
)

GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
FUSED = (("gate_up_proj", "down_proj"),)
"""Names of the linear modules in blocks whose first module computes gate and up together."""

PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("wi", "wo"))
LAST, WITHIN = ("c_fc",), ("wi", "wi_0")
"""Names of the first modules of blocks with `dropout` last (LAST) or before the last linear module (WITHIN)."""

ACTIVATION = ("act_fn", "activation_fn", "act")
ATTRIBUTES = frozenset({"config", "hidden_size", "intermediate_size", "mlp_bias", "layer_idx", "embed_dim"})
"""Known attributes of feed-forward modules. If an attribute has an effect, a probe shows it."""


@dataclass(frozen=True)
class BoundFeedForward:
    """A fused feed-forward block, bound to one module.

    Attributes:
        module: The block, or a layer that holds the modules of a block as its own children.
        names: Names of the linear modules.
        act: Name of the activation in `lorakit.ops.activation`.
    """

    module: nn.Module
    names: tuple[str, ...]
    act: str

    def accepts(self, options: Options) -> bool:
        """Return whether a call has no arguments besides the hidden states."""
        return not options

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the output for x (…, d), or None if the block's own `forward` must run."""
        return feed_forward(self, x, None, residual=False)


def match(module: nn.Module) -> BoundFeedForward | str:
    """Return the fused `forward` of a feed-forward block, or why the module is not a supported block."""
    made = match_children(module)
    if isinstance(made, str):
        return made
    return unknown_attributes(module, ATTRIBUTES, (*made.names, *ACTIVATION, "dropout")) or made


def match_children(module: nn.Module) -> BoundFeedForward | str:
    """Return the fused `forward` of a block whose modules are children of `module`, or why they are not supported."""
    names = _names(module)
    if names is None:
        return "unknown children for a feed-forward block"
    function = _activation(module)
    act = activation_of(function)
    return unknown_activation(function) or "" if act is None else BoundFeedForward(module, names, act)


def feed_forward(
    block: BoundFeedForward, x: Tensor, norm: Norm | None, *, residual: bool, dropout: float = 0.0
) -> Tensor | None:
    """Compute a feed-forward block, including the norm before it and the residual after it.

    Args:
        block: The block.
        x: Hidden states (…, d) that `is_supported` accepts.
        norm: Norm before the block, or None.
        residual: Whether to add x to the output.
        dropout: Dropout probability after the block.

    Returns:
        The output (…, d), or None if the module's own `forward` must run.
    """
    module, names = block.module, block.names
    dropouts = _probabilities(module, names, dropout)
    if dropouts is None or is_activation_watched(_activation(module)):
        return None
    acting = active_operands(modules_at(module, names), forwards_of(module), x)
    if acting is None:
        return None
    *inner, down = acting.operands
    keep, fused = RECOMPUTES not in module.__dict__, names in FUSED
    y = mlp(x, Form(tuple(inner), down, activation(block.act), norm, residual, *dropouts, fused=fused, keep=keep))
    acting.note(y)
    return y


def _probabilities(module: nn.Module, names: tuple[str, ...], behind: float) -> tuple[float, float] | None:
    """Return the current dropout probabilities for the output and the inner activation, or None if unknown."""
    own = dropout_p(module._modules.get("dropout"))
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


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return next((getattr(module, name) for name in ACTIVATION if hasattr(module, name)), None)
