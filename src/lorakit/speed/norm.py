"""Fused norms and dropout modules, and their current operands, which other fused `forward` methods use.

A fused norm saves only its input and one or two values per row, instead of several fp32 copies. On a CPU, a fused
dropout module samples the positions to drop instead of drawing one random number per element.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.ops.dropout import dropout
from lorakit.ops.norm import Norm, normalize
from lorakit.speed.patching import is_watched
from lorakit.speed.submodules import Options

RMS = ("RMSNorm", "T5LayerNorm")
"""Suffixes of RMS norm class names."""

EPSILONS = ("variance_epsilon", "eps")


def norm_of(module: nn.Module | None) -> Norm | None:
    """Return the operands of a norm over the last dimension, or None if the norm is unknown or not frozen."""
    if module is None or is_watched(module):
        return None
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.ndim != 1 or weight.requires_grad:
        return None
    if bias is not None and bias.requires_grad:
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", weight, bias, module.eps)
    eps = next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None or bias is not None or not type(module).__name__.endswith(RMS):
        return None
    return Norm("rms", weight, None, eps, 1.0 if type(module).__name__.startswith("Gemma") else 0.0)


def norms_at(module: nn.Module, first: str, second: str) -> tuple[Norm | None, Norm | None] | None:
    """Return the operands of two norms, with None for a missing child; return None if either norm is unknown.

    Args:
        module: Module whose children are the norms.
        first: Name of the first norm.
        second: Name of the second norm.
    """
    children = module._modules.get(first), module._modules.get(second)
    norms = norm_of(children[0]), norm_of(children[1])
    is_known = all(norm is not None or child is None for norm, child in zip(norms, children, strict=True))
    return norms if is_known else None


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported norm, or None if it is one."""
    return None if norm_of(module) is not None else "not a frozen LayerNorm or RMSNorm"


def run(module: nn.Module, x: Tensor, options: Options) -> Tensor | None:
    """Return the normalized x (…, d), or None if the module's own `forward` must run."""
    norm = norm_of(module)
    if norm is None or options or (norm.weight is not None and norm.weight.dtype != x.dtype):
        return None  # if the dtypes differ, the dtype of the output depends on the model
    if norm.kind == "layer" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32:
        return None  # a layer norm returns float32 under autocast
    return normalize(x, norm)


def dropout_p(module: nn.Module | None) -> float | None:
    """Return a module's current dropout probability: 0 if there is no module, or None if it is not supported."""
    if module is None or (isinstance(module, nn.Identity) and not is_watched(module)):
        return 0.0
    if not isinstance(module, nn.Dropout) or is_watched(module) or module.p >= 1:
        return None
    return module.p if module.training else 0.0


def fits_dropout(module: nn.Module) -> str | None:
    """Return why a module is not a supported dropout module, or None if it is one."""
    if type(module) is nn.Dropout and not module.inplace and 0 < module.p < 1:
        return None
    return "not a plain, active dropout"


def run_dropout(module: nn.Dropout, x: Tensor, options: Options) -> Tensor | None:
    """Return x (any shape) after dropout, or None if the module's own `forward` must run."""
    return None if options or x.device.type != "cpu" else dropout(x, module.p, module.training)
