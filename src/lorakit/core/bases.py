"""The table BASES: how a base weight is read and written, whatever way it is stored.

Canonical orientation is (out, in) in at least fp32. A row knows how one way of storage maps to it and
back, and how to keep and restore the very bits. It knows nothing about A, B or adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Base:
    """One way a weight is stored.

    Attributes:
        name: What messages call it.
        types: Types of the weight, or of the module that holds it, as dotted names.
        transposed: The stored weight is (in, out); a reader of files needs to know.
        quantised: Writing loses more than a rounding to the weight's dtype.
        read: Stored parameter -> canonical weight, (out, in), fp32 or wider; a view where it can be one.
        write: Canonical weight and the parameter's present tensor -> the tensor to store, in its dtype.
    """

    name: str
    types: tuple[str, ...]
    transposed: bool
    quantised: bool
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Tensor]


def _read_dense(stored: Tensor) -> Tensor:
    return at_least_fp32(stored.detach())


def _write_dense(canonical: Tensor, stored: Tensor) -> Tensor:
    return canonical.to(stored.dtype).contiguous()


def _read_transposed(stored: Tensor) -> Tensor:
    return at_least_fp32(stored.detach()).T


def _write_transposed(canonical: Tensor, stored: Tensor) -> Tensor:
    return canonical.T.to(stored.dtype).contiguous()


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32 or, where it is wider already, as it is; any shape (…)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


BASES: tuple[Base, ...] = (
    Base(
        name="transposed",
        types=("transformers.pytorch_utils.Conv1D", "torch.nn.modules.sparse.Embedding"),
        transposed=True,
        quantised=False,
        read=_read_transposed,
        write=_write_transposed,
    ),
    Base(
        name="dense",
        types=("torch.nn.modules.module.Module",),
        transposed=False,
        quantised=False,
        read=_read_dense,
        write=_write_dense,
    ),
)


def base_of(module: nn.Module, parameter: str = "weight") -> Base:
    """How a parameter of a module is stored: the weight's type is asked first, then the module's.

    Args:
        module: A module of the base.
        parameter: Name of its weight.
    """
    for owner in (type(getattr(module, parameter)), type(module)):
        for ancestor in owner.__mro__:
            dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
            for base in BASES:
                if dotted in base.types:
                    return base
    return BASES[-1]
