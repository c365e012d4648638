"""What may be computed without calling a module: one that nobody watches, and a dropout that is the plain one."""

from __future__ import annotations

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether something would be passed over if a module's weight were used without calling it.

    That is a hook, or a forward that somebody set on the instance, as device maps do.
    """
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def share_dropped(dropout: nn.Module) -> float | None:
    """The share that a dropout drops now, or None where it is no plain dropout.

    Args:
        dropout: What stands before A.
    """
    if isinstance(dropout, nn.Identity):
        return 0.0
    if type(dropout) is not nn.Dropout or is_watched(dropout):
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1 else None
