"""`StoredWeight`: reads, keeps, replaces and restores the stored weight of a site.

The base's module is only changed in `place`; `base_weight` decides what is stored, and when.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.kinds import Kind, WeightSpec, kind_named
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.quantization import Stored, WeightFormat, weight_format_of
from lorakit.core.variants import Factor
from lorakit.errors import MergeError

STORED = frozenset({"kept", "moved", "tied_weight"})
"""Attributes that hold what the base stored or will store, in any form."""

OF_THE_BASE = frozenset({"weight", "bias"})
"""Attributes that, when set on the layer, belong to the base module: other code ties weights that way."""


class StoredWeight(AdapterModule):
    """A module around a base module, one of whose weights can be written and restored.

    Attributes:
        base_layer: The module that was here, or another layer around it.
        slot: The weight.
        r: Adapter -> rank.
        variant: Adapter -> the name of its variant.
        merged_adapters: Adapters that are merged into the base weight now.
        kept: What the base stored before anything was written to it, or None.
        moved_by: The adapters that act on a moved base: the one whose init moved it (PiSSA, for example), or all those
            whose variant moves it alike. Empty where the base is as it was.
        moved: What the base stores for them.
        initial: That adapter's A and B before training, in main memory.
        replaced: The base's quantized module if a merge replaced it by a plain one, in a tuple, so that it is no
            submodule; else empty.
        kept_bias: The base's bias, (out,), from before a merge wrote to it (`lora_bias`), or None.
        tied_weight: The parameter that the base shared with others before a merge untied it, or None.
        old_bias: Who trains the base's bias, and what it was before, (out,), or None.
    """

    slot: WeightSpec
    kind_name: str
    r: dict[str, int]
    variant: dict[str, str]
    merged_adapters: list[str]
    kept: Stored | None = None
    moved_by: tuple[str, ...] = ()
    moved: Stored | None = None
    initial: tuple[Tensor, Tensor] | None = None
    replaced: tuple[nn.Module, ...] = ()
    kept_bias: Tensor | None = None
    tied_weight: nn.Parameter | None
    old_bias: tuple[str, Tensor] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_THE_BASE:
            setattr(self.base_layer, name, value)
        elif name in STORED:  # a quantized weight is a parameter, and a stored one does not belong to this layer
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def factor(self, name: str) -> Factor:
        """Return an adapter's A (r, in) and B (out, r)."""

    @abstractmethod
    def bias_of(self, adapter: str) -> Tensor | None:
        """Return the bias of an adapter's B, (out,), or None."""

    @abstractmethod
    def addition(self, name: str, W: Tensor) -> Tensor:
        """Return what an adapter adds to the base weight W, (out, in)."""

    @property
    def kind(self) -> Kind:
        """The row of KINDS."""
        return kind_named(self.kind_name, self.state.kinds)

    @property
    def owner(self) -> nn.Module:
        """The base's own module; layers of several weights of one module are nested around it."""
        module: Any = self._modules["base_layer"]  # faster than torch's attribute access, and asked often
        while isinstance(module, StoredWeight):
            module = module._modules["base_layer"]
        return module

    @property
    def source(self) -> nn.Module:
        """The module that holds the base's weight: the owner, or the one that a dense module has replaced."""
        return self.replaced[0] if self.replaced else self.owner

    @property
    def base(self) -> WeightFormat[Any, Any]:
        """The entry of WEIGHT_FORMATS."""
        return self.storage[0]

    @property
    def storage(self) -> tuple[WeightFormat[Any, Any], nn.Module]:
        """The entry of WEIGHT_FORMATS, and the module that holds the weight."""
        source = self.source
        return weight_format_of(source, self.slot.parameter, self.slot.as_stored), source

    @property
    def keeps_base(self) -> bool:
        """Whether the weight from before the first merge is kept."""
        return self.kept is not None or bool(self.replaced)

    def read(self, adapter: str | None = None) -> Tensor:
        """Return the base weight without anything merged, canonical (out, in), fp32 or wider.

        Args:
            adapter: As this adapter sees it: one that moved the base has a base of its own.
        """
        base, source = self.storage
        kept = self._kept_for(adapter in self.moved_by)
        return base.read(source, _as_now(base, source, self.slot.parameter, kept))

    def original(self) -> Stored:
        """Return what the base stored before anything was written to it, on the base's device and in its dtype."""
        return _as_now(*self.storage, self.slot.parameter, self.kept)

    def moved_base(self) -> Stored:
        """Return what the base stores for the adapters that moved it, on the base's device and in its dtype."""
        return _as_now(*self.storage, self.slot.parameter, self._kept_for(True))

    def _kept_for(self, moved: bool) -> Stored | None:
        """Return the kept weight for the adapter with a residual base, or for others; None if the module holds it."""
        if moved:
            return self.moved if self.merged_adapters else None
        return self.kept

    def original_bias(self) -> Tensor | None:
        """Return the base's bias, (out,), without anything merged, or None."""
        now = getattr(self.owner, "bias", None)
        bias = now if self.kept_bias is None or now is None else self.kept_bias.to(now.device, now.dtype)
        return bias if isinstance(bias, Tensor) else None

    def inside(self) -> frozenset[str]:
        """Return the adapters for which the base's module is right: merged ones, and those that moved it.

        Where one of several that moved it is merged, the others are not in the module.
        """
        merged = frozenset(self.merged_adapters)
        return merged if merged.intersection(self.moved_by) else merged.union(self.moved_by)

    def _base_for(self, moved: bool) -> nn.Module:
        """The base's module with nothing merged, as the adapters that moved it have it or as it was."""
        if not self.merged_adapters and (moved or not self.moved_by):
            return self.base_layer
        self.check_kept()
        clone = self.base.clone(self.source, self.slot.parameter, self.moved_base() if moved else self.original())
        if self.kept_bias is not None:
            held: Any = clone._parameters if "bias" in clone._parameters else clone.__dict__
            held["bias"] = self.original_bias()
        return clone

    def move_base(self, adapter: str, stored: Stored, initial: tuple[Tensor, Tensor] | None) -> None:
        """Put the base weight that an adapter acts on in place, as stored; the original is kept.

        Args:
            adapter: The adapter.
            stored: What the base stores from now on; one that another adapter moved alike stays as it is.
            initial: The adapter's A (r, in) and B (out, r) before training if the base became W − s·B·A.
        """
        if self.moved_by:
            self.moved_by = (*self.moved_by, adapter)
            return
        self.kept = self.original()
        self.moved_by, self.moved = (adapter,), stored
        self.initial = initial and (initial[0].detach().to("cpu", copy=True), initial[1].detach().to("cpu", copy=True))
        self.base.place(self.owner, self.slot.parameter, stored)

    def check_kept(self) -> None:
        """Reject to go back to a base whose values were not kept.

        Raises:
            MergeError: Something is merged and the original was not kept.
        """
        if self.merged_adapters and self.kept is None and not self.replaced:
            raise MergeError(
                f"{', '.join(self.merged_adapters)} is merged into the base and its bits were not kept "
                "(keep_base=False), so the base alone and other adapters are not available. Merge with "
                "keep_base=True, or load the base again."
            )

    def merged_here(self) -> Sequence[str]:
        """Return the adapters that are merged here now."""
        return self.merged_adapters

    def kept_bytes(self) -> int:
        """Return the memory of the original, if a merge kept it."""
        if not self.keeps_base:
            return 0
        base = self.base
        kept = self.kept if self.kept is not None else base.stored(self.source, self.slot.parameter)
        return sum(tensor.numel() * tensor.element_size() for tensor in base.tensors(kept))

    def place(self, stored: Stored | nn.Module) -> None:
        """Put what a merge or its undoing stores into the base: a module instead of the owner, or a weight into it."""
        if isinstance(stored, nn.Module):
            self.replaced = self.replaced or (self.owner,)
            self.base_layer = stored
            return
        base, source = self.storage
        base.place(source, self.slot.parameter, stored)
        if self.replaced:
            self.base_layer, self.replaced = self.replaced[0], ()


def _as_now(base: WeightFormat[Any, Any], source: nn.Module, parameter: str, stored: Stored | None) -> Stored:
    """Return a stored weight, or the current one if that is None, on the base's device and in its dtype."""
    if stored is not None and (base.quantized or not isinstance(stored, Tensor)):
        return stored
    now = base.stored(source, parameter)
    return now if stored is None else stored.to(device=now.device, dtype=now.dtype)


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Make a tensor (out,) the bias of a module, whether that is a parameter of it or, as in HQQ, an attribute."""
    held = module._parameters.get("bias")
    if held is not None:
        held.data = bias
    else:
        module.__dict__["bias"] = bias


def give_back(owner: nn.Module, parameter: str, held: nn.Parameter, stored: Tensor) -> None:
    """Give a module the parameter again that it shared before a merge untied it.

    Args:
        owner: The module.
        parameter: The parameter's name there.
        held: The parameter, of any shape; an earlier merge may have written to it, and it does not follow the model to
            another device or dtype.
        stored: What it holds afterwards, where the model is now, of the same shape.
    """
    same = (held.device, held.dtype) == (stored.device, stored.dtype) and torch.equal(held.detach(), stored)
    if not same:
        held.data = stored.detach()
    owner._parameters[parameter] = held
