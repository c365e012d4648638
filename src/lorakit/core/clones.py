"""Module clones that share everything but one weight, and whether a module is watched by hooks.

Shallow clones of modules: the same module with some tensors or children of its own, for one forward.

Nothing of the original is touched, so another thread that runs it sees no change.

What may be computed without calling a module: one that nobody watches, and a dropout that is the plain one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

PARAMETRISED = "parametrizations"
"""Where `torch.nn.utils.parametrize` keeps what computes a parameter."""

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps its hooks."""


def clone_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow clone of a module that has some parameters of its own; the module is not touched.

    Args:
        module: Any module.
        tensors: Names of direct parameters -> the tensors that the clone has instead, of the same shapes (…); they
            may have a graph.

    Returns:
        The clone; everything else is shared. It is meant to live for one forward.
    """
    parametrised = module._modules.get(PARAMETRISED)
    if parametrised is None or tensors.keys().isdisjoint(parametrised._modules):
        return _shallow(module, type(module), tensors, dict(module._modules))
    # torch put a class with properties in front of the module's own; the clone is of its own class, with plain tensors
    others = {name: getattr(module, name) for name in parametrised._modules}
    children = {name: child for name, child in module._modules.items() if name != PARAMETRISED}
    return _shallow(module, type(module).__mro__[1], {**others, **tensors}, children)


def bare(module: nn.Module) -> nn.Module:
    """A shallow clone of a module without other people's hooks, for a forward that is not one of the model's own.

    Args:
        module: Any module.

    Returns:
        The clone; hooks that are part of what the module computes (`part_of_module`) are on it.
    """
    clone = clone_with(module, {})
    ours = {key: hook for key, hook in module._forward_hooks.items() if _is_part(hook)}
    for table in HOOKS:
        clone.__dict__[table] = OrderedDict()
    clone._forward_hooks.update(ours)
    clone._forward_hooks_with_kwargs.update((k, v) for k, v in module._forward_hooks_with_kwargs.items() if k in ours)
    return clone


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A shallow clone of a module whose other people's hooks run once, around a forward made of several `bare` ones.

    Args:
        module: Any module.
        forward: What takes the place of its forward.
    """
    clone = clone_with(module, {})
    for table in ("_forward_hooks", "_forward_hooks_with_kwargs"):
        kept = ((k, v) for k, v in getattr(module, table).items() if not _is_part(module._forward_hooks.get(k)))
        clone.__dict__[table] = OrderedDict(kept)
    clone.__dict__["forward"] = forward
    return clone


def _is_part(hook: Any) -> bool:
    return getattr(hook, "part_of_module", False)


def _shallow(
    module: nn.Module, made_of: type[nn.Module], tensors: Mapping[str, Tensor], children: dict[str, nn.Module | None]
) -> nn.Module:
    clone = made_of.__new__(made_of)
    parameters = {**module._parameters, **tensors}
    own = {name: value for name, value in module.__dict__.items() if name not in tensors}  # FSDP lays some there
    clone.__dict__ = {**own, "_parameters": parameters, "_modules": children}
    return clone


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
