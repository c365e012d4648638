"""`StoredWeight`: reads, keeps, replaces and restores the stored weight of a site.

This file writes weights to the base module; `base_weight` decides what to store, and when.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.kinds import Kind, WeightSpec, kind_named
from lorakit.core.layers.adapter_component import AdapterModule, base_not_kept
from lorakit.core.quantization import Stored, WeightFormat, weight_format_of
from lorakit.core.variants import Factor
from lorakit.errors import MergeError

STORED = frozenset({"kept", "moved", "tied_weight"})
"""Attributes that hold stored weights of the base, in any form."""

OF_THE_BASE = frozenset({"weight", "bias"})
"""Attributes that, if assigned on the layer, are set on the base module, because other code ties weights this way."""


Replacement = Stored | nn.Module
"""A stored weight, or a plain module that replaces the base module."""


class StoredWeight(AdapterModule):
    """A wrapper around a base module that can write and restore one of the module's weights.

    Attributes:
        base_layer: The base module, or another layer around it.
        spec: Description of the weight: its shape, layout and parameter name.
        r: Adapter -> rank.
        scaling: Adapter -> scale.
        variant: Adapter -> the name of its variant.
        cast_input_dtype_enabled: Whether the input is cast to the dtype of an A that is called as a module.
        kept: The stored base weight from before the first change, or None if that weight was not kept.
        moved_by: The adapters that use a residual base: either the one whose init (such as PiSSA) created it, or all
            adapters whose variants require it. Empty if the base is unchanged.
        moved: The stored residual base, or None.
        initial: The initial A and B of the adapter whose init created the residual base, in main memory; or None.
        replaced: A tuple with the base module if a merge replaced that module with a plain one, otherwise empty. The
            tuple keeps the module from being registered as a submodule.
        kept_bias: The base bias, (out,), before a merge changed it (`lora_bias`), or None.
        tied_weight: The parameter that the base shared with other modules before a merge untied it, or None.
        old_bias: The adapter that trains the base bias, and the bias before training, (out,); or None.
    """

    _modules: dict[str, nn.Module]  # type: ignore[assignment]  # no child is None here
    spec: WeightSpec
    kind_name: str
    r: dict[str, int]
    scaling: dict[str, float]
    variant: dict[str, str]
    cast_input_dtype_enabled: bool = True
    merged_adapters: list[str]
    kept: Stored | None = None
    moved_by: tuple[str, ...] = ()
    moved: Stored | None = None
    initial: tuple[Tensor, Tensor] | None = None
    replaced: tuple[nn.Module, ...] = ()
    kept_bias: Tensor | None = None
    tied_weight: nn.Parameter | None
    old_bias: tuple[str, Tensor] | None = None

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name in OF_THE_BASE:
            setattr(self.base_layer, name, value)
        elif name in STORED:  # a quantized weight is a parameter, which must not be registered on this layer
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def factor(self, name: str) -> Factor:
        """Return an adapter's A (r, in) and B (out, r)."""

    @abstractmethod
    def bias_of(self, adapter: str) -> Tensor | None:
        """Return the bias of an adapter's B, (out,), or None if B has no bias."""

    @abstractmethod
    def addition(self, name: str, W: Tensor) -> Tensor:
        """Return the tensor that an adapter adds to the base weight W, (out, in)."""

    @property
    def kind(self) -> Kind:
        """The layer's kind: an entry in KINDS, or a user-defined kind."""
        return kind_named(self.kind_name, self.state.kinds)

    @property
    def owner(self) -> nn.Module:
        """The innermost base module; if several of its weights are adapted, the layers are nested around it."""
        module = self._modules["base_layer"]  # faster than torch's attribute access; this property is read often
        while isinstance(module, StoredWeight):
            module = module._modules["base_layer"]
        return module

    @property
    def source(self) -> nn.Module:
        """The module that holds the base weight: the owner, or the original module if a plain one replaced it."""
        return self.replaced[0] if self.replaced else self.owner

    @property
    def base(self) -> WeightFormat[Any, Any]:
        """The weight format, an entry in WEIGHT_FORMATS."""
        return self.storage[0]

    @property
    def storage(self) -> tuple[WeightFormat[Any, Any], nn.Module]:
        """The weight format, and the module that holds the weight."""
        source = self.source
        return weight_format_of(source, self.spec.parameter, self.spec.as_stored), source

    @property
    def keeps_base(self) -> bool:
        """True if the original weight, from before the first merge, is kept."""
        return self.kept is not None or bool(self.replaced)

    def read(self, adapter: str | None = None) -> Tensor:
        """Return the base weight without merged adapters, in canonical shape (out, in) and in fp32 or wider.

        If an adapter is given and uses a residual base, that base is returned.
        """
        base, source = self.storage
        kept = self._kept_for(adapter in self.moved_by)
        return base.read(source, _as_now(base, source, self.spec.parameter, kept))

    def original(self, moved: bool = False) -> Stored:
        """Return the stored weight, or the residual base if `moved`, without merged adapters, on the base's device."""
        return _as_now(*self.storage, self.spec.parameter, self._kept_for(moved))

    def _kept_for(self, moved: bool) -> Stored | None:
        """Return the kept original, or the residual base if `moved`; None if the module itself holds that weight."""
        if moved:
            return self.moved if self.merged_adapters else None
        if self.kept is None and self.moved_by and not self.merged_adapters:
            names = ", ".join(self.moved_by)
            text = (
                f"The original weight was not kept, so only adapter {names} can be used. Load the base and the adapter."
            )
            raise MergeError(text, what=names)
        return self.kept

    def original_bias(self) -> Tensor | None:
        """Return the base bias without merged adapters, (out,), or None if the base has no bias."""
        now = getattr(self.owner, "bias", None)
        bias = now if self.kept_bias is None or now is None else self.kept_bias.to(now.device, now.dtype)
        return bias if isinstance(bias, Tensor) else None

    def inside(self) -> frozenset[str]:
        """Return the adapters that the stored weight reflects: those merged, or else those that use the residual base.

        If an adapter that uses the residual base is merged, the module no longer holds the base that others need.
        """
        merged = frozenset(self.merged_adapters)
        return merged if merged.intersection(self.moved_by) else merged.union(self.moved_by)

    def _base_for(self, moved: bool) -> nn.Module:
        """Return the base module without merged adapters, holding the residual base if `moved`, else the original."""
        if not self.merged_adapters and (moved or not self.moved_by):
            return self.base_layer
        self.check_kept()
        clone = self.base.clone(self.source, self.spec.parameter, self.original(moved))
        if self.kept_bias is not None:
            held: dict[str, Any] = clone._parameters if "bias" in clone._parameters else clone.__dict__
            held["bias"] = self.original_bias()
        return clone

    def move_base(self, adapter: str, stored: Stored, initial: tuple[Tensor, Tensor] | None) -> None:
        """Store the residual base that an adapter uses, unless another adapter uses it already; the original is kept.

        `initial` is A (r, in) and B (out, r) if the base became W − s·B·A, else None.
        """
        if self.moved_by:
            self.moved_by = (*self.moved_by, adapter)
            return
        self.kept = self.original()
        self.moved_by, self.moved = (adapter,), stored
        self.initial = initial and (initial[0].detach().to("cpu", copy=True), initial[1].detach().to("cpu", copy=True))
        self.base.put_stored(self.owner, self.spec.parameter, stored)

    def release_original(self) -> None:
        """Stop keeping the original of a residual base; from then on, only the residual base can be used.

        Afterwards, the adapter can be trained and saved, but not be disabled, detached or merged.
        """
        self.kept = self.moved = None

    def check_kept(self) -> None:
        """Raise a MergeError if adapters are merged, but the original weight was not kept."""
        if self.merged_adapters and not self.keeps_base:
            raise base_not_kept(self.merged_adapters)

    def kept_bytes(self) -> int:
        """Return the size, in bytes, of the original weight if a merge kept it, else 0."""
        if not self.keeps_base:
            return 0
        base = self.base
        kept = self.kept if self.kept is not None else base.stored(self.source, self.spec.parameter)
        return sum(tensor.numel() * tensor.element_size() for tensor in base.tensors(kept))

    def put_stored(self, stored: Replacement) -> None:
        """Store the result of merging or unmerging: a module that replaces the owner, or a weight."""
        if isinstance(stored, nn.Module):
            self.replaced = self.replaced or (self.owner,)
            self.base_layer = stored
            return
        base, source = self.storage
        base.put_stored(source, self.spec.parameter, stored)
        if self.replaced:
            self.base_layer, self.replaced = self.replaced[0], ()


def _as_now(base: WeightFormat[Any, Any], source: nn.Module, parameter: str, stored: Stored | None) -> Stored:
    """Return a stored weight on the base's device and in its dtype; if `stored` is None, use the current one."""
    if stored is not None and (base.quantized or not isinstance(stored, Tensor)):
        return stored
    now = base.stored(source, parameter)
    return now if stored is None else stored.to(device=now.device, dtype=now.dtype)


def give_back(owner: nn.Module, parameter: str, shared: nn.Parameter, stored: Tensor) -> None:
    """Restore the parameter that a module shared before a merge untied it, with the values `stored` (any shape).

    A merge may have written to `shared`, and its device and dtype may differ from the model's, which `stored` has.
    """
    same = (shared.device, shared.dtype) == (stored.device, stored.dtype) and torch.equal(shared.detach(), stored)
    if not same:
        shared.data = stored.detach()
    owner._parameters[parameter] = shared
