"""The recipe of norms: one function that keeps its input and one number per row, instead of a chain of fp32 copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.norm import normalised
from lorakit.speed.submodules import is_usual, norm_of


def fits(module: nn.Module) -> str | None:
    """Why a module is no norm that is known, or None where it is one."""
    return None if norm_of(module) is not None else "no frozen LayerNorm or RMSNorm"


def run(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """The norm of x (…, d), or None where the module's own forward has to run."""
    norm = norm_of(module)
    if norm is None or args or kwargs or not isinstance(x, Tensor) or not is_usual(x):
        return None
    if norm.weight is not None and norm.weight.dtype != x.dtype:
        return None  # what comes out has another dtype, which depends on the model
    if norm.kind == "layer" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32:
        return None  # autocast gives float32
    return normalised(x, norm)
