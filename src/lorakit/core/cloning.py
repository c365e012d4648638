"""Shallow clones of modules: the same module with some tensors or children of its own, for one forward.

Nothing of the original is touched, so another thread that runs it sees no change.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

PARAMETRISED = "parametrizations"
"""Where `torch.nn.utils.parametrize` keeps what computes a parameter."""


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


def _shallow(
    module: nn.Module, made_of: type[nn.Module], tensors: Mapping[str, Tensor], children: dict[str, nn.Module | None]
) -> nn.Module:
    clone = made_of.__new__(made_of)
    parameters = {**module._parameters, **tensors}
    own = {
        name: value for name, value in module.__dict__.items() if name not in tensors
    }  # FSDP lays some there
    clone.__dict__ = {**own, "_parameters": parameters, "_modules": children}
    return clone
