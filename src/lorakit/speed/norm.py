"""Fused norms, which save their input and one or two values per row instead of several fp32 copies; and fused dropout
on a CPU, which draws the dropped positions instead of one decision per element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.dropout import dropout
from lorakit.ops.norm import normalize
from lorakit.speed.submodules import is_supported, norm_of


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported norm, or None if it is."""
    return None if norm_of(module) is not None else "not a frozen LayerNorm or RMSNorm"


def run(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the norm of x (…, d), or None if the module's own forward must run."""
    norm = norm_of(module)
    if norm is None or args or kwargs or not isinstance(x, Tensor) or not is_supported(x):
        return None
    if norm.weight is not None and norm.weight.dtype != x.dtype:
        return None  # the output dtype then depends on the model
    if norm.kind == "layer" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32:
        return None  # autocast returns float32
    return normalize(x, norm)


def fits_dropout(module: nn.Module) -> str | None:
    """Return why a module is not a supported dropout, or None if it is."""
    if type(module) is nn.Dropout and not module.inplace and 0 < module.p < 1:
        return None
    return "not a plain active dropout"


def run_dropout(module: nn.Dropout, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the dropout of x (any shape), or None if the module's own forward must run."""
    if args or kwargs or not isinstance(x, Tensor) or x.device.type != "cpu" or not is_supported(x):
        return None
    return dropout(x, module.p, module.training)
