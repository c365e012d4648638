"""What a entry of WEIGHT_FORMATS says: how one way of storing a weight maps to the canonical weight and back.

Canonical is the leading axis out, in fp32 or wider. What a module stores (a tensor, or a packed thing of a quantiser)
is its business: a row takes it out, reads it, makes a new one, puts it back. It knows nothing about A, B or adapters.

Weights that are stored as plain tensors of floats, as they are or transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.errors import MergeError


def one_tensor(stored: Any) -> tuple[Tensor, ...]:
    """A plain weight, of any shape, consists of itself."""
    return (stored,)


def exact_values(stored: Any, places: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of a plain weight at places (n,) of it flattened, in fp32 or wider, and errors of nothing, both (n,)."""
    numbers = at_least_fp32(stored.detach()[torch.unravel_index(places, stored.shape)])
    return numbers, torch.zeros_like(numbers)


def needs_no_hold(_: nn.Module) -> bool:
    """A plain weight is not rewritten by its module."""
    return False


def lets_nothing_go(_: nn.Module) -> None:
    """There was nothing to hold."""


def linear_with(module: Any, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
    """A plain nn.Linear in the place of a quantised one: weight (out, in) in a dtype, the same bias and mode."""
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = canonical.shape
    made.weight = nn.Parameter(canonical.to(dtype), requires_grad=False)
    if getattr(module, "bias", None) is not None:
        made.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return made.train(module.training)


@dataclass(frozen=True)
class WeightFormat:
    """One way a weight is stored.

    Attributes:
        name: What messages call it.
        types: Types of the weight, or of the module that holds it, as dotted names.
        transposed: The stored weight is (in, out); a reader of files needs to know.
        quantised: Writing loses more than a rounding to the weight's dtype.
        written: There is a place to write a new weight to.
        stored: Module, name of its parameter -> what lies there now; it shares memory with the module.
        read: Module, stored thing -> canonical weight, (out, in) or as its kind says, fp32 or wider.
        write: Module, stored thing to be like, canonical weight -> a new thing to store.
        place: Module, name, stored thing -> None: puts it into the module; a plain parameter stays the same object.
        clone: Module, name, stored thing -> a shallow clone of the module that holds the thing.
        device: Module, name -> where the weight lies.
        tensors: Stored thing -> the tensors that it consists of.
        dense: Module, canonical weight (out, in), dtype -> a plain module to put in its place, whose weight that is.
        values: Stored thing, places in the canonical weight flattened row after row (of a plain weight: in the weight
            as it lies), (n,) -> the numbers there, and how far each may be from what was quantised, both (n,); the
            rest is not multiplied out.
        hold: Module -> whether it had to be kept from rewriting its own weight in a forward, which it is now.
        let_go: Module that was held -> None: ends that.
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
    written: bool = True
    tensors: Callable[[Any], tuple[Tensor, ...]] = one_tensor
    dense: Callable[[nn.Module, Tensor, torch.dtype], nn.Module] = linear_with
    values: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = exact_values
    hold: Callable[[nn.Module], bool] = needs_no_hold
    let_go: Callable[[nn.Module], None] = lets_nothing_go


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32 or, where it is wider already, as it is; any shape (…)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stored(module: nn.Module, parameter: str) -> Tensor:
    tensor: Tensor = getattr(module, parameter)  # not from _parameters: FSDP has plain tensors there in a forward
    return tensor.detach()


def _read(_: nn.Module, stored: Tensor) -> Tensor:
    return at_least_fp32(stored.detach())


def _write(_: nn.Module, like: Tensor, canonical: Tensor) -> Tensor:
    return canonical.to(like.dtype).contiguous()


def _place(module: nn.Module, parameter: str, stored: Tensor) -> None:
    held: nn.Parameter = module._parameters[parameter]  # type: ignore[assignment]
    held.data = stored.to(held.device)


def _clone(module: nn.Module, parameter: str, stored: Tensor) -> nn.Module:
    return clone_with(module, {parameter: stored})


def _read_transposed(_: nn.Module, stored: Tensor) -> Tensor:
    return at_least_fp32(stored.detach()).T


def _write_transposed(_: nn.Module, like: Tensor, canonical: Tensor) -> Tensor:
    return canonical.T.to(like.dtype).contiguous()


def _device(module: nn.Module, parameter: str) -> torch.device:
    return module._parameters[parameter].device  # type: ignore[union-attr]


def _computed(module: nn.Module, parameter: str) -> Tensor:
    tensor: Tensor = getattr(module, parameter)
    return tensor.detach()


def _place_computed(module: nn.Module, parameter: str, stored: Tensor) -> None:
    raise MergeError(NOT_WRITTEN.format(parameter=parameter, type=type(module).__name__))


def _device_computed(module: nn.Module, parameter: str) -> torch.device:
    return _computed(module, parameter).device


NOT_WRITTEN = (
    "The parameter {parameter!r} of {type} is computed by torch.nn.utils.parametrize, so nothing can be written into "
    "it. Remove the parametrization first."
)

DENSE = WeightFormat(
    name="dense",
    types=("torch.nn.modules.module.Module",),
    transposed=False,
    quantised=False,
    stored=_stored,
    read=_read,
    write=_write,
    place=_place,
    clone=_clone,
    device=_device,
)

COMPUTED = replace(
    DENSE,
    name="computed",
    types=(),
    written=False,
    stored=_computed,
    place=_place_computed,
    device=_device_computed,
)
"""A parameter that torch.nn.utils.parametrize computes: it can be read, and there is no place to write it to."""

TRANSPOSED = replace(
    DENSE,
    name="transposed",
    types=("transformers.pytorch_utils.Conv1D", "torch.nn.modules.sparse.Embedding"),
    transposed=True,
    read=_read_transposed,
    write=_write_transposed,
)

COMPUTED_TRANSPOSED = replace(
    TRANSPOSED,
    name="computed transposed",
    types=(),
    written=False,
    stored=_computed,
    place=_place_computed,
    device=_device_computed,
)
"""The same of a module that stores its weight as (in, out)."""
