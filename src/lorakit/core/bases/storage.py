"""What a row of the table BASES says: how one way of storing a weight maps to the canonical weight and back.

Canonical is the leading axis out, in fp32 or wider. What a module stores (a tensor, or a packed thing of a quantiser)
is its business: a row takes it out, reads it, makes a new one, puts it back. It knows nothing about A, B or adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        stored: Module, name of its parameter -> what lies there now; it shares memory with the module.
        read: Module, stored thing -> canonical weight, (out, in) or as its kind says, fp32 or wider.
        write: Module, stored thing to be like, canonical weight -> a new thing to store.
        place: Module, name, stored thing -> None: puts it into the module; a plain parameter stays the same object.
        clone: Module, name, stored thing -> a shallow clone of the module that holds the thing.
        device: Module, name -> where the weight lies.
    """

    name: str
    types: tuple[str, ...]
    transposed: bool
    quantised: bool
    stored: Callable[[nn.Module, str], Any]
    read: Callable[[nn.Module, Any], Tensor]
    write: Callable[[nn.Module, Any, Tensor], Any]
    place: Callable[[nn.Module, str, Any], None]
    clone: Callable[[nn.Module, str, Any], nn.Module]
    device: Callable[[nn.Module, str], torch.device]


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32 or, where it is wider already, as it is; any shape (…)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
