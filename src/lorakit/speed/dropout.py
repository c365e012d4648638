"""The recipe of dropout on a CPU: it draws what is dropped, instead of a decision for every number."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.ops.dropout import dropout
from lorakit.speed.submodules import is_usual


def fits(module: nn.Module) -> str | None:
    """Why a module is no dropout that is known, or None where it is one."""
    if type(module) is nn.Dropout and not module.inplace and 0 < module.p < 1:
        return None
    return "no plain dropout that drops something"


def run(module: nn.Dropout, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Dropout of x (any shape), or None where the module's own forward has to run."""
    if args or kwargs or not isinstance(x, Tensor) or x.device.type != "cpu" or not is_usual(x):
        return None
    return dropout(x, module.p, module.training)
