"""Tell if a tensor was changed in place since something about it was remembered.

What is remembered is kept in the tensor's own `__dict__`, so it goes with the tensor, and no other one with the same
`id` is taken for it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def version_of(x: Tensor) -> int | Tensor:
    """Return what `is_version` compares later: the count of changes, or a copy of an inference tensor, which has none.

    Args:
        x: A tensor of any shape (…).
    """
    return x.clone() if x.is_inference() else x._version


def is_version(x: Tensor, version: int | Tensor) -> bool:
    """Return whether a tensor is as it was.

    Args:
        x: The tensor, of any shape (…).
        version: What `version_of` returned for it.
    """
    if isinstance(version, Tensor):
        return torch.equal(x, version)
    return not x.is_inference() and version == x._version
