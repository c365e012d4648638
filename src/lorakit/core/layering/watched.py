"""What may be computed without calling a module: one that nobody watches, and a dropout that is the plain one."""

from __future__ import annotations

from torch import nn

CAPTURING = "transformers.utils.output_capturing"
"""Module of the hooks by which transformers collects outputs. They stay after the first forward that asked for some."""


def is_watched(module: nn.Module, *, captures: bool = True) -> bool:
    """Whether something would be passed over if a module's weight were used without calling it.

    That is a hook, or a forward that somebody set on the instance, as device maps do.

    Args:
        module: Any module.
        captures: Whether the hooks count that collect outputs which a call asked for; who knows that it asks for none
            leaves them out.
    """
    after = module._forward_hooks.values()
    return bool(
        "forward" in module.__dict__
        or (after if captures else [hook for hook in after if getattr(hook, "__module__", "") != CAPTURING])
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
