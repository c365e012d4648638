"""Fused dropout on a CPU: draws the dropped positions instead of one decision per element."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.ops.dropout import dropout
from lorakit.speed.submodules import is_supported


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported dropout, or None if it is."""
    if type(module) is nn.Dropout and not module.inplace and 0 < module.p < 1:
        return None
    return "not a plain active dropout"


def run(module: nn.Dropout, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the dropout of x (any shape), or None if the module's own forward must run."""
    if args or kwargs or not isinstance(x, Tensor) or x.device.type != "cpu" or not is_supported(x):
        return None
    return dropout(x, module.p, module.training)
