"""Shallow clones of modules: the same module with some tensors or children of its own, for one forward.

Nothing of the original is touched, so another thread that runs it sees no change.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def clone_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow clone of a module that has some parameters of its own; the module is not touched.

    Args:
        module: Any module.
        tensors: Names of direct parameters -> the tensors that the clone has instead, of the same shapes (…); they
            may have a graph.

    Returns:
        The clone; everything else is shared. It is meant to live for one forward.
    """
    clone = module.__new__(type(module))
    clone.__dict__ = {
        **module.__dict__,
        "_parameters": {**module._parameters, **tensors},
        "_modules": dict(module._modules),
    }
    return clone
