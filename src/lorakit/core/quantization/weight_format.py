"""`WeightFormat`: conversion between a weight's stored form and its canonical form.

A canonical weight is in fp32 or wider, and its leading axis is the output axis. Only formats get, read, create and
replace stored weights. Those in this file store plain floating-point tensors, transposed or not.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from lorakit.choices import CONV1D
from lorakit.core.clones import clone_with, is_pruned
from lorakit.errors import MergeError, ModelError

NOT_WRITTEN = (
    "The parameter {parameter!r} of {type} is computed by torch.nn.utils.parametrize or prune, so it cannot be "
    "written. Remove the parametrization, or make the pruning permanent (prune.remove), first."
)


SOURCE = "source_cls"
"""Attribute in which a quantized layer, of bitsandbytes or int8, holds the class of the module that it replaced."""


class Packed:
    """A stored weight that consists of several tensors."""


Stored = Tensor | Packed
"""The stored form of a canonical weight; it may share memory with the module."""

M = TypeVar("M", bound=nn.Module)
S = TypeVar("S", bound=Stored)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return a tensor (any shape) in fp32, or unchanged if its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def exact_values(stored: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return elements (n,) of a plain weight (any shape), in fp32 or wider, and their errors (n,), which are zero."""
    values = at_least_fp32(stored.detach()[torch.unravel_index(positions, stored.shape)])
    return values, torch.zeros_like(values)


def linear_with(module: nn.Module, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return a plain module with the given weight (out, in) and dtype, and the bias and training mode of `module`.

    It is a Conv1D of transformers if `module` replaced one, else an nn.Linear.
    """
    plain: nn.Module
    before: type[nn.Module] = getattr(module, SOURCE, nn.Linear)
    if before.__name__ == CONV1D:
        plain, weight = before(*canonical.shape).to(dtype), canonical.T.to(dtype).contiguous()
    else:
        plain, weight = nn.Linear(1, 1, bias=False, device="meta"), canonical.to(dtype)
        plain.out_features, plain.in_features = canonical.shape
    plain.weight = nn.Parameter(weight, requires_grad=False)
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)


@dataclass(frozen=True)
class WeightFormat(Generic[M, S]):
    """A way to store a weight. M is the type of the module that holds the weight; S is the type of the stored weight.

    Attributes:
        types: Dotted names of the weight types or module types that use this format.
        transposed: Whether the stored weight is (in, out), both in memory and in weight files.
        quantized: Whether writing a weight loses more precision than rounding it to a floating-point dtype.
    """

    name: str
    types: tuple[str, ...] = ()
    transposed: bool = False
    written: bool = True
    parameters: tuple[str, ...] = ()
    quantized: ClassVar[bool] = True

    @abstractmethod
    def stored(self, module: M, parameter: str) -> S:
        """Return what a module currently stores for a parameter; the result shares memory with the module."""

    @abstractmethod
    def read(self, module: M, stored: S) -> Tensor:
        """Return the canonical weight in fp32 or wider; it is (out, in) unless the layer type defines another shape."""

    @abstractmethod
    def write(self, module: M, like: S, canonical: Tensor) -> S:
        """Convert a canonical weight (out, in) to stored form, with the settings of the stored weight `like`."""

    @abstractmethod
    def put_stored(self, module: M, parameter: str, stored: S) -> None:
        """Write a stored weight to a module. A plain parameter remains the same object; only its data is replaced."""

    @abstractmethod
    def tensors(self, stored: S) -> tuple[Tensor, ...]:
        """Return the tensors that make up a stored weight, starting with the values; they can have any shape."""

    @abstractmethod
    def values(self, stored: S, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return elements (n,) of a stored weight, and bounds (n,) on their quantization errors; only they are
        dequantized.

        The positions (n,) are those in the flattened canonical weight, or in the flattened stored weight if that is
        plain.
        """

    def part_names(self, module: M) -> tuple[str, ...]:
        """Return the names of the parameters of a weight, in the order of `tensors`; empty if it is one parameter."""
        return ()

    def check(self, module: M, path: str) -> None:
        """Check that a module's weight can be read; the path is for messages."""

    def device(self, module: M, parameter: str) -> torch.device:
        """Return the device of a module's weight."""
        return self.tensors(self.stored(module, parameter))[0].device

    def clone(self, module: M, parameter: str, stored: S) -> nn.Module:
        """Return a shallow clone of a module, with its weight replaced by another stored weight."""
        clone: M = clone_with(module, {})  # type: ignore[assignment]
        self.put_stored(clone, parameter, stored)
        return clone

    def dense(self, module: M, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
        """Return a plain module with a canonical weight (out, in), to replace a quantized module."""
        return linear_with(module, canonical, dtype)

    def disable_repacking(self, module: M) -> bool:
        """Keep a module from repacking its weight in a forward pass; return whether the module would have done so."""
        return False

    def allow_repacking(self, module: M) -> None:
        """Undo `disable_repacking`."""


class PlainFormat(WeightFormat[nn.Module, Tensor]):
    """Format of a floating-point tensor, either a parameter or the read-only result of a parametrization."""

    quantized = False

    def check(self, module: nn.Module, path: str) -> None:
        """Raise a ModelError if a weight consists of integers, which only a quantized module could dequantize."""
        weight = module._parameters.get("weight")
        if weight is not None and not (weight.is_floating_point() or weight.is_complex()):
            text = (
                f"{path}: the files contain integers ({weight.dtype}) for this layer, which their quantization_config "
                "leaves unquantized. Load the model from files with the config that they were saved with."
            )
            raise ModelError(text, what=str(weight.dtype), where=path, field="quantization_config")

    def stored(self, module: nn.Module, parameter: str) -> Tensor:
        """Return the tensor, of any shape."""
        if is_pruned(module, parameter):  # the attribute is updated only in a forward pass
            return (module._parameters[f"{parameter}_orig"] * module._buffers[f"{parameter}_mask"]).detach()  # type: ignore[operator]
        tensor: Tensor = getattr(module, parameter)  # FSDP puts plain tensors in _parameters during a forward pass
        return tensor.detach()

    def device(self, module: nn.Module, parameter: str) -> torch.device:
        """Return the tensor's device."""
        tensor: Tensor = getattr(module, parameter)
        return tensor.device

    def read(self, module: nn.Module, stored: Tensor) -> Tensor:
        """Return the tensor (out, …) in fp32 or wider, with the output axis first."""
        weight = at_least_fp32(stored.detach())
        return weight.transpose(0, 1) if self.transposed else weight

    def write(self, module: nn.Module, like: Tensor, canonical: Tensor) -> Tensor:
        """Return the canonical weight (out, …) in the dtype and layout of the tensor `like`."""
        return (canonical.transpose(0, 1) if self.transposed else canonical).to(like.dtype).contiguous()

    def put_stored(self, module: nn.Module, parameter: str, stored: Tensor) -> None:
        """Make the parameter use the memory of a tensor of any shape; a MergeError if it is computed."""
        if not self.written:
            text = NOT_WRITTEN.format(parameter=parameter, type=type(module).__name__)
            raise MergeError(text, what=type(module).__name__, field=parameter)
        holder: nn.Parameter = module._parameters[parameter]  # type: ignore[assignment]
        holder.data = stored.to(holder.device)

    def clone(self, module: nn.Module, parameter: str, stored: Tensor) -> nn.Module:
        """Return a shallow clone of a module with the parameter replaced by a tensor of any shape."""
        return clone_with(module, {parameter: stored})

    def tensors(self, stored: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor itself, of any shape."""
        return (stored,)

    def values(self, stored: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return elements (n,) of the tensor and their errors (n,), which are zero."""
        return exact_values(stored, positions)


DENSE = PlainFormat("dense", ("torch.nn.modules.module.Module",))

TRANSPOSED = PlainFormat(
    "transposed", ("transformers.pytorch_utils.Conv1D", "torch.nn.modules.sparse.Embedding"), transposed=True
)

COMPUTED = PlainFormat("computed", written=False)
"""A parameter that torch.nn.utils.parametrize or prune computes: it can be read, but there is nothing to write to."""

COMPUTED_TRANSPOSED = PlainFormat("computed transposed", transposed=True, written=False)
"""Like COMPUTED, but for a module that stores its weight as (in, out)."""
