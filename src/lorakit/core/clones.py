"""Shallow clones of modules, and modules that have hooks.

A clone shares everything with its module except some tensors or children, and lives for one forward. The module itself
is not changed, so another thread that runs it sees no difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import Tensor, nn

PARAMETRISED = "parametrizations"
"""The child in which `torch.nn.utils.parametrize` stores what computes a parameter."""

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes of a module with its hooks."""


def clone_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow clone of a module with other tensors as some of its parameters.

    Args:
        module: Any module.
        tensors: Names of direct parameters -> the clone's tensors, of the same shapes (…); they may have a graph.
    """
    parametrised = module._modules.get(PARAMETRISED)
    if parametrised is None or tensors.keys().isdisjoint(parametrised._modules):
        return _shallow(module, type(module), tensors, dict(module._modules))
    # torch derived a class with properties from the module's own; the clone has its own class and plain tensors
    others = {name: getattr(module, name) for name in parametrised._modules}
    children = dict(module._modules)
    del children[PARAMETRISED]
    return _shallow(module, type(module).__mro__[1], {**others, **tensors}, children)


def bare(module: nn.Module) -> nn.Module:
    """Return a shallow clone of a module without the user's hooks, for a forward in addition to the model's own.

    Args:
        module: Any module.

    Returns:
        The clone; it has the hooks that are part of the module's computation (`part_of_module`).
    """
    clone = clone_with(module, {})
    clone.__dict__.update((table, OrderedDict()) for table in HOOKS)
    _keep_hooks(clone, module, parts=True)
    return clone


def with_forward(module: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    """Return a shallow clone of a module that runs the user's hooks once, around another forward.

    Args:
        module: Any module.
        forward: The clone's forward, which returns a tensor (…) and calls several `bare` modules.
    """
    clone = clone_with(module, {})
    _keep_hooks(clone, module, parts=False)
    clone.__dict__["forward"] = forward
    return clone


def _keep_hooks(clone: nn.Module, module: nn.Module, *, parts: bool) -> None:
    """Give a clone only those forward hooks of a module that are part of its computation, or only the others."""
    kept = {key for key, hook in module._forward_hooks.items() if getattr(hook, "part_of_module", False) is parts}
    for table in ("_forward_hooks", "_forward_hooks_with_kwargs"):
        clone.__dict__[table] = OrderedDict((key, hook) for key, hook in getattr(module, table).items() if key in kept)


def _shallow(
    module: nn.Module, made_of: type[nn.Module], tensors: Mapping[str, Tensor], children: dict[str, nn.Module | None]
) -> nn.Module:
    clone = made_of.__new__(made_of)
    parameters = {**module._parameters, **tensors}
    own = {name: value for name, value in module.__dict__.items() if name not in tensors}  # FSDP stores some there
    clone.__dict__ = {**own, "_parameters": parameters, "_modules": children}
    return clone


CAPTURING = "transformers.utils.output_capturing"
"""Module of the hooks with which transformers collects outputs; they are not removed after the forward."""


def is_watched(module: nn.Module, *, captures: bool = True) -> bool:
    """Return whether using a module's weight without calling the module would skip something.

    That is a hook, or a forward set on the instance, as device maps do.

    Args:
        module: Any module.
        captures: Whether hooks that collect outputs count; False if the call is known to collect none.
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
    """Return the fraction that a dropout drops in its current mode, or None if it is not a plain dropout.

    Args:
        dropout: The module before A.
    """
    if isinstance(dropout, nn.Identity):
        return 0.0
    if type(dropout) is not nn.Dropout or is_watched(dropout):
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1 else None
