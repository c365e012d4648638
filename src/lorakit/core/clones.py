"""Shallow clones of modules, and checks for hooks.

A clone shares everything with the original module except for certain tensors or child modules, and is used for a single
forward pass. The original is not changed, so other threads can use the original at the same time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType

from torch import Tensor, nn

PARAMETRISED = "parametrizations"
"""Name of the child module in which `torch.nn.utils.parametrize` stores the functions that compute parameters."""

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Module attributes that hold hooks."""


def is_pruned(module: nn.Module, parameter: str) -> bool:
    """Return whether torch.nn.utils.prune computes a parameter: a hook multiplies `weight_orig` by `weight_mask`."""
    return f"{parameter}_orig" in module._parameters and f"{parameter}_mask" in module._buffers


def clone_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow clone of a module with some of its own parameters replaced by tensors of their shape (…)."""
    parametrised = module._modules.get(PARAMETRISED)
    if parametrised is None or tensors.keys().isdisjoint(parametrised._modules):
        return _shallow(module, type(module), tensors, dict(module._modules))
    # parametrize changed the module's class to a subclass with properties; the clone gets the original class and plain
    # tensors
    others = {name: getattr(module, name) for name in parametrised._modules}
    children = dict(module._modules)
    del children[PARAMETRISED]
    return _shallow(module, type(module).__mro__[1], {**others, **tensors}, children)


def bare(module: nn.Module) -> nn.Module:
    """Return a shallow clone of a module with only the hooks that are part of its computation (`part_of_module`)."""
    clone = clone_with(module, {})
    clone.__dict__.update((table, OrderedDict()) for table in HOOKS)
    _keep_hooks(clone, module, parts=True)
    return clone


def with_forward(module: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    """Return a shallow clone of a module with a new `forward`, around which the user's hooks run once.

    This forward calls several `bare` clones and returns a tensor (…).
    """
    clone = clone_with(module, {})
    _keep_hooks(clone, module, parts=False)
    clone.__dict__["forward"] = forward
    return clone


def _keep_hooks(clone: nn.Module, module: nn.Module, *, parts: bool) -> None:
    """Copy to a clone the forward hooks that are part of the module's computation (`parts`), or all other ones."""
    kept = {key for key, hook in module._forward_hooks.items() if getattr(hook, "part_of_module", False) is parts}
    for table in ("_forward_hooks", "_forward_hooks_with_kwargs"):
        clone.__dict__[table] = OrderedDict((key, hook) for key, hook in getattr(module, table).items() if key in kept)


def _shallow(
    module: nn.Module, made_of: type[nn.Module], tensors: Mapping[str, Tensor], children: dict[str, nn.Module | None]
) -> nn.Module:
    clone = made_of.__new__(made_of)
    parameters = {**module._parameters, **tensors}
    # FSDP stores some parameters directly in __dict__
    own = {name: _rebound(value, module, clone) for name, value in module.__dict__.items() if name not in tensors}
    clone.__dict__ = {**own, "_parameters": parameters, "_modules": children}
    pruned = [name for name in tensors if is_pruned(module, name)]
    if pruned:  # the hook would compute the parameter again
        hooks = module._forward_pre_hooks.items()
        kept = [(key, hook) for key, hook in hooks if getattr(hook, "_tensor_name", None) not in pruned]
        clone.__dict__["_forward_pre_hooks"] = OrderedDict(kept)
    return clone


def _rebound(value: object, module: nn.Module, clone: nn.Module) -> object:
    """Return a function that is stored in a module, such as a new `forward`, bound to a clone; other values as is."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, clone)
    if isinstance(value, partial) and any(one is module for one in value.args):
        return partial(value.func, *(clone if one is module else one for one in value.args), **value.keywords)
    return value


SHARDING = "torch.distributed.fsdp"
"""Start of the name of the modules that define FSDP2's hooks, and the classes that it derives from those of modules."""


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the class that it had before FSDP2 sharded the module."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith(SHARDING))


CAPTURING = "transformers.utils.output_capturing"
"""The transformers module that defines output-collecting hooks, which stay installed after the forward pass."""


def is_watched(module: nn.Module, *, captures: bool = True) -> bool:
    """Return whether using a module's weight without calling the module would skip a hook or a custom `forward`.

    Device maps, for example, replace `forward` on the module. `captures` says whether output-collecting hooks count.
    """
    after = module._forward_hooks.values()
    return bool(
        "forward" in module.__dict__
        or (after if captures else [hook for hook in after if getattr(hook, "__module__", "") != CAPTURING])
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_observers(module: nn.Module) -> bool:
    """Return whether a module has hooks or a custom `forward` that may depend on the values of its output.

    Hooks of FSDP2 on the module itself do not: they gather its weights before the call, and free them after it.
    """
    if not is_watched(module, captures=False):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    others = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith((SHARDING, CAPTURING))]
    return bool("forward" in module.__dict__ or others or module._backward_hooks or module._backward_pre_hooks)


def share_dropped(dropout: nn.Module) -> float | None:
    """Return the fraction of values that the dropout before A zeroes in its current mode; None for unsupported modules.

    The supported modules are nn.Identity and nn.Dropout without hooks; a dropout with p = 1 is supported only in eval
    mode.
    """
    if isinstance(dropout, nn.Identity):
        return 0.0
    if type(dropout) is not nn.Dropout or is_watched(dropout):
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1 else None
