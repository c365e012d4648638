"""Modules that hold an adapter's dropout and tensors at one site: A, B, and the variant's extra tensors.

A (r, in) and B (out, r) have the orientation of nn.Linear weights, regardless of the base weight's layout. Except for
dropout, the modules only store parameters under the names that PEFT uses. Their `forward` is called only if the user
puts a hook on them, or if FSDP makes such a module a unit, whose parameters are whole only while the module is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.quantization import is_computed

BOTH = frozenset({"A", "B"})
"""The factors of a site that an init or a variant trains, unless it freezes one of them."""

HOLDERS: Mapping[str, type[nn.ModuleDict | nn.ParameterDict]] = {
    "lora_dropout": nn.ModuleDict,
    "lora_A": nn.ModuleDict,
    "lora_B": nn.ModuleDict,
    "lora_embedding_A": nn.ParameterDict,
    "lora_embedding_B": nn.ParameterDict,
}
"""Name of a layer attribute that has one entry per adapter -> type of the attribute's container.

Variants' extra tensors have their own containers (`OwnTensor.held_as`). Containers are created on first access, because
most layers need only three of them.
"""

TRAINED = tuple(name for name in HOLDERS if name != "lora_dropout")
"""The attributes in HOLDERS that hold A or B; each A comes before its B."""


class FactorWeight(nn.Linear):
    """An nn.Linear that holds A or B as its `.weight` and skips the random initialization.

    The class derives from nn.Linear because some programs look for modules of that type.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        out_features, in_features = weight.shape
        # hundreds of such modules are created at once, and setting attributes on a module is slow
        self.__dict__.update(out_features=out_features, in_features=in_features)
        self._parameters.update(weight=weight, bias=bias)

    def forward(self, input: Tensor | None = None) -> Any:
        """Return the product of an input (…, in) with the weight, or copies of the weight and the bias for None."""
        return copies(self) if input is None else super().forward(input)


class OwnWeight(nn.Module):
    """A module whose `.weight`, of any shape (…), is a variant's extra tensor or a convolution's A or B factor."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Return copies of the weight (…) and the bias (out,)."""
        return copies(self)


def copies(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return copies of a module's weight (…) and bias (out,) or None, through which gradients flow."""
    weight, bias = module.weight, module.bias
    return weight.clone(), None if bias is None else bias.clone()  # type: ignore[operator]


class OwnTensors(nn.Module):
    """A module that holds a variant's extra tensors (…) of one adapter, each under its name."""


class BufferDict(nn.Module, MutableMapping[str, Tensor]):
    """Dictionary of buffers, perhaps `persistent`, that move with the parent module, as PEFT's class of this name."""

    __eq__, __hash__ = nn.Module.__eq__, nn.Module.__hash__

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def extra_repr(self) -> str:
        """Return one line per buffer."""
        return "\n".join(
            f"  ({key}): Buffer containing: [{type(buffer).__name__} of size {'x'.join(map(str, buffer.shape))}]"
            for key, buffer in self.items()
        )


def parameter(tensor: Tensor) -> nn.Parameter:
    """Return a tensor, such as A (r, in), as an nn.Parameter; an existing parameter is returned unchanged."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


OF_OWN_TENSORS: Mapping[str, Callable[[], nn.Module]] = {
    "module": nn.ModuleDict,
    "parameter": nn.ParameterDict,
    "buffer": partial(BufferDict, persistent=True),
}
"""`OwnTensor.carried` -> function that creates the container of a variant's extra tensors."""


def own_container(carried: str, member: str) -> nn.Module:
    """Return an empty container for a variant's extra tensors, one per adapter, by a key of `OF_OWN_TENSORS`."""
    return nn.ModuleDict() if member else OF_OWN_TENSORS[carried]()


def put_own(holder: Any, adapter: str, member: str, carried: str, tensor: Tensor) -> None:
    """Add an adapter's extra tensor (…), such as a diagonal (r,), to its container from `own_container`."""
    entry = tensor.detach() if carried == "buffer" else parameter(tensor)
    if not member:
        holder[adapter] = OwnWeight(parameter(tensor)) if carried == "module" else entry
        return
    if adapter not in holder:
        holder[adapter] = OwnTensors()
    if carried == "buffer":
        holder[adapter].register_buffer(member, entry)
    else:
        setattr(holder[adapter], member, entry)


def weight_holder(weight: nn.Parameter, bias: Tensor | None = None) -> nn.Module:
    """Return a module that holds A or B (…), with at least two dimensions, and the bias (out,) of B if there is one."""
    own = None if bias is None else parameter(bias)
    return FactorWeight(weight, own) if weight.ndim == 2 else OwnWeight(weight, own)


def make_dropout(p: float) -> nn.Module:
    """Return the dropout module to apply before A, or an nn.Identity if p is 0."""
    return nn.Dropout(p) if p > 0 else nn.Identity()


def factor_dtype(module: nn.Module, parameter: str) -> torch.dtype:
    """Return the dtype of A and B for a base weight: fp32, or the weight's dtype if that is wider."""
    weight = getattr(module, parameter) if is_computed(module, parameter) else module._parameters.get(parameter)
    is_wide = weight is not None and weight.is_floating_point() and weight.dtype.itemsize > torch.float32.itemsize
    return weight.dtype if is_wide else torch.float32  # type: ignore[union-attr]
