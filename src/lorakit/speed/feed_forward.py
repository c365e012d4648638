"""Fused feed-forward blocks, either gated (SwiGLU, GeGLU) or plain, with adapters, dropout and a norm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lorakit.ops.activation import activation
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm
from lorakit.speed.linear import active_operands, forwards_of
from lorakit.speed.norm import dropout_p
from lorakit.speed.patching import RECOMPUTES, modules_at
from lorakit.speed.submodules import Options, activation_of, unknown_activation, unknown_attributes

GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
FUSED = (("gate_up_proj", "down_proj"),)
"""Names of the linear modules in blocks whose first module computes gate and up together."""

PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("wi", "wo"))
LAST, WITHIN = ("c_fc",), ("wi", "wi_0")
"""Names of the first modules of blocks with `dropout` last (LAST) or before the last linear module (WITHIN)."""

ACTIVATION = ("act_fn", "activation_fn", "act")
ATTRIBUTES = frozenset({"config", "hidden_size", "intermediate_size", "mlp_bias", "layer_idx", "embed_dim"})
"""Known attributes of feed-forward modules. If an attribute has an effect, a probe shows it."""


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported feed-forward block, or None if it is one."""
    names = _names(module)
    if names is None:
        return "unknown children for a feed-forward block"
    known = (*names, *ACTIVATION, "dropout")
    return unknown_activation(_activation(module)) or unknown_attributes(module, ATTRIBUTES, known)


def run(module: nn.Module, x: Tensor, options: Options) -> Tensor | None:
    """Return the output for x (…, d), or None if the block's own `forward` must run."""
    return None if options else feed_forward(module, x, None, residual=False)


def feed_forward(
    module: nn.Module, x: Tensor, norm: Norm | None, *, residual: bool, dropout: float = 0.0
) -> Tensor | None:
    """Compute a feed-forward block, including the norm before it and the residual after it.

    Args:
        module: A block that `fits` accepts, or a layer that holds the modules of a block as its own children.
        x: Hidden states (…, d) that `is_supported` accepts.
        norm: Norm before the block, or None.
        residual: Whether to add x to the output.
        dropout: Dropout probability after the block.

    Returns:
        The output (…, d), or None if the module's own `forward` must run.
    """
    names, act = _names(module), activation_of(_activation(module))
    dropouts = None if names is None else _probabilities(module, names, dropout)
    if names is None or act is None or dropouts is None:
        return None
    acting = active_operands(modules_at(module, names), forwards_of(module), x)
    if acting is None:
        return None
    *inner, down = acting.operands
    keep, fused = RECOMPUTES not in module.__dict__, names in FUSED
    y = mlp(x, Form(tuple(inner), down, activation(act), norm, residual, *dropouts, fused=fused, keep=keep))
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
