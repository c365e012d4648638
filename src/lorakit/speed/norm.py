"""Fused norms: one function that saves its input and one or two values per row instead of several fp32 copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.norm import normalize
from lorakit.speed.submodules import is_supported, norm_of


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported norm, or None if it is."""
    return None if norm_of(module) is not None else "not a frozen LayerNorm or RMSNorm"


def run(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the norm of x (…, d), or None if the module's own forward must run."""
    norm = norm_of(module)
    if norm is None or args or kwargs or not isinstance(x, Tensor) or not is_supported(x):
        return None
    if norm.weight is not None and norm.weight.dtype != x.dtype:
        return None  # the output dtype then depends on the model
    if norm.kind == "layer" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32:
        return None  # autocast returns float32
    return normalize(x, norm)
