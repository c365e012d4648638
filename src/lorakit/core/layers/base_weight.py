"""`BaseWeight`: what the base stores at a site, and how it changes: merged, moved by an init, replaced, and restored.

A merge is staged (everything is computed, checked and allocated) and then committed. The layer only knows one weight;
which layers change, and in which order, is decided by `merging`.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.kinds import Kind, Slot, kind_named
from lorakit.core.layers.adapter_component import AdapterModule, MergeOptions, StagedMerge
from lorakit.core.layers.merged_weight import merged_weight, stored_with, sum_of_updates, weight_with
from lorakit.core.quantization import NOT_WRITTEN, Base, at_least_fp32, base_of
from lorakit.core.variants import Factor, variant_named
from lorakit.errors import MergeError

STORED = frozenset({"kept", "moved", "tied_weight"})
"""Attributes that hold what the base stored or will store, in any form."""

OF_THE_BASE = frozenset({"weight", "bias"})
"""Attributes that, when set on the layer, belong to the base module: other code ties weights that way."""


@dataclass(frozen=True)
class StagedBias:
    """A bias that is ready to be put into the base.

    Attributes:
        value: The bias, (out,).
        kept: The base's own, (out,), from before; None if `value` is the base's own.
    """

    value: Tensor
    kept: Tensor | None


class BaseWeight(AdapterModule):
    """A module around a base module, one of whose weights can be written and restored.

    Attributes:
        base_layer: The module that was here, or another layer around it.
        slot: The weight.
        r: Adapter -> rank.
        variant: Adapter -> the name of its variant.
        merged_adapters: Adapters that are merged into the base weight now.
        kept: What the base stored before anything was written to it, or None.
        moved_by: The adapter whose init moved the base weight (PiSSA, for example), or None.
        moved: What the base stores for the adapter that moved it.
        initial: That adapter's A and B before training, in main memory.
        replaced: The base's quantized module if a merge replaced it by a plain one, in a tuple, so that it is no
            submodule; else empty.
        kept_bias: The base's bias, (out,), from before a merge wrote to it (`lora_bias`), or None.
        tied_weight: The parameter that the base shared with others before a merge untied it, or None.
        old_bias: Who trains the base's bias, and what it was before, (out,), or None.
    """

    slot: Slot
    kind_name: str
    r: dict[str, int]
    variant: dict[str, str]
    merged_adapters: list[str]
    kept: Any = None
    moved_by: str | None = None
    moved: Any = None
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
        while isinstance(module, BaseWeight):
            module = module._modules["base_layer"]
        return module

    @property
    def source(self) -> nn.Module:
        """The module that holds the base's weight: the owner, or the one that a dense module has replaced."""
        return self.replaced[0] if self.replaced else self.owner

    @property
    def base(self) -> Base:
        """The row of BASES."""
        return self.storage[0]

    @property
    def storage(self) -> tuple[Base, nn.Module]:
        """The row of BASES, and the module that holds the weight."""
        source = self.source
        return base_of(source, self.slot.parameter, self.slot.as_stored), source

    @property
    def keeps_base(self) -> bool:
        """Whether the weight from before the first merge is still there."""
        return self.kept is not None or bool(self.replaced)

    def read(self, adapter: str | None = None) -> Tensor:
        """Return the base weight without anything merged, canonical (out, in), fp32 or wider.

        Args:
            adapter: As this adapter sees it: one whose init moved the base has a base of its own.
        """
        base, source = self.storage
        kept = self._kept_for(adapter is not None and adapter == self.moved_by)
        return base.read(source, _as_now(base, source, self.slot.parameter, kept))

    def original(self) -> Any:
        """Return what the base stored before anything was written to it, on the base's device and in its dtype."""
        return _as_now(*self.storage, self.slot.parameter, self.kept)

    def moved_base(self) -> Any:
        """Return what the base stores for the adapter that moved it, on the base's device and in its dtype."""
        return _as_now(*self.storage, self.slot.parameter, self._kept_for(True))

    def _kept_for(self, moved: bool) -> Any:
        """What is kept for the adapter that moved the base, or for others; None: it is in the base's module."""
        if moved:
            return self.moved if self.merged_adapters else None
        return self.kept

    def original_bias(self) -> Tensor | None:
        """Return the base's bias, (out,), without anything merged, or None."""
        now = getattr(self.owner, "bias", None)
        bias = now if self.kept_bias is None or now is None else self.kept_bias.to(now.device, now.dtype)
        return bias if isinstance(bias, Tensor) else None

    def inside(self) -> frozenset[str]:
        """Return the adapters for which the base's module is right: merged ones, and one that moved it."""
        return frozenset((*self.merged_adapters, *([self.moved_by] if self.moved_by is not None else [])))

    def _base_for(self, moved: bool) -> nn.Module:
        """The base's module with nothing merged, as the adapter that moved it has it or as it was."""
        if not self.merged_adapters and (moved or self.moved_by is None):
            return self.base_layer
        self.check_kept()
        clone = self.base.clone(self.source, self.slot.parameter, self.moved_base() if moved else self.original())
        if self.kept_bias is not None:
            held: Any = clone._parameters if "bias" in clone._parameters else clone.__dict__
            held["bias"] = self.original_bias()
        return clone

    def move_base(self, adapter: str, stored: Any, initial: tuple[Tensor, Tensor] | None) -> None:
        """Put the base weight that the init of an adapter made in place, as stored; the original is kept.

        Args:
            adapter: The adapter.
            stored: What the base stores from now on.
            initial: The adapter's A (r, in) and B (out, r) before training if the base became W − s·B·A.
        """
        self.kept = self.original()
        self.moved_by, self.moved = adapter, stored
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
                "(keep_base=False), so the base alone and other adapters cannot be had. Merge with keep_base=True, "
                "or load the base anew."
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

    def check_mergeable(self, path: str, adapters: Sequence[str]) -> None:
        """Reject adapters that no weight can hold, or whose bias has no place; nothing is computed.

        Args:
            path: This layer's path, for messages.
            adapters: Adapters; those without a factor here are ignored.

        Raises:
            MergeError: The message names the adapter and the path.
        """
        for name in adapters:
            variant = variant_named(self.variant[name]) if name in self.variant else None
            if variant is not None and not variant.is_mergeable:
                raise MergeError(
                    f"Adapter {name!r} at {path} is {variant.title}, which cannot be merged: "
                    f"{variant.unmergeable_reason}. Keep it next to the base.",
                    what=name,
                    where=path,
                )
        self._check_place_of_bias(path, adapters)

    def _check_place_of_bias(self, path: str, adapters: Sequence[str]) -> None:
        """Refuse a bias of B where the base has none, or where another adapter trains the base's."""
        bringing = [name for name in adapters if self.bias_of(name) is not None]
        if not bringing:
            return
        trainer = None if self.old_bias is None else self.old_bias[0]
        for name in bringing:
            if trainer is not None and name != trainer:
                raise MergeError(
                    f"Adapter {name!r} brings a bias of its own (lora_bias), and adapter {trainer!r} trains the base's "
                    f"at {path}, so it cannot be merged. Detach {trainer!r} first.",
                    what=name,
                    where=path,
                    field="lora_bias",
                )
        if self.original_bias() is None:
            raise MergeError(
                f"Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: {path} has no "
                "place for the adapter's.",
                where=path,
                field="lora_bias",
            )

    def check_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> None:
        """Reject a merge that this weight cannot take now; nothing is computed.

        Args:
            path: This layer's path, for messages.
            adapters: Adapters; those without a factor here are ignored.
            options: How they are merged.

        Raises:
            MergeError: An adapter is merged already or cannot be, or the weight cannot be written.
        """
        here = [name for name in adapters if name in self.r]
        if not here:
            return
        self.check_mergeable(path, here)
        twice = [name for name in here if name in self.merged_adapters]
        if twice:
            raise MergeError(f"Adapter {twice[0]!r} is merged already. Unmerge it first.", what=twice[0])
        base = self.base
        if not base.written:
            raise MergeError(NOT_WRITTEN.format(parameter=self.slot.parameter, type=type(self.owner).__name__))
        if self.merged_adapters and not self.keeps_base:
            raise MergeError(
                f"{path} holds {', '.join(self.merged_adapters)}, merged with keep_base=False, so its base is gone. "
                "Load the base anew and merge all adapters in one call.",
                where=path,
            )
        replaces = options.dense is not None and (base.quantised or self.slot.groups > 1)
        if replaces and self.old_bias is not None and (options.in_place or self.old_bias[0] not in adapters):
            trainer = self.old_bias[0]
            raise MergeError(
                f"dense=True puts another module at {path}, whose bias adapter {trainer!r} trains in place. Detach "
                f"{trainer!r} first, or merge with dense=False.",
                what=trainer,
                where=path,
            )

    def check_unmerge(self, path: str, adapters: Sequence[str]) -> None:
        """Reject to unmerge adapters if the base's values were not kept.

        Args:
            path: This layer's path, for messages.
            adapters: Adapters; those that are not merged here are ignored.

        Raises:
            MergeError: The message names the adapter and the path.
        """
        lost = [name for name in adapters if name in self.merged_adapters]
        if lost and not self.keeps_base:
            raise MergeError(
                f"Adapter {lost[0]!r} was merged with keep_base=False, so the bits of {path} are gone. "
                "Load the base anew.",
                what=lost[0],
                where=path,
            )

    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Compute the weight with more adapters merged, and measure it; nothing is changed.

        With `keep_base=False` the weight is dropped once it is measured, and committing computes it again: two passes
        instead of a second copy of the model.

        Args:
            path: This layer's path, for the report and for messages.
            adapters: Adapters; those without a factor here are ignored.
            options: How they are merged.

        Raises:
            MergeError: The result is not finite.
        """
        new = [name for name in adapters if name in self.r]
        if not new:
            return None
        merged, report = merged_weight(path, self, new, options)
        bias = self._staged_bias([*self.merged_adapters, *new])
        if options.keep_base is False:
            return StagedMerge(report, functools.partial(self._write_unkept, new, options, bias))
        kept = self.kept
        if kept is None and not isinstance(merged.stored, nn.Module):
            on_cpu = options.keep_base == "cpu" and not merged.base.quantised
            kept = merged.original.to("cpu") if on_cpu else merged.original
        storage = merged.base, merged.source  # without the tensors that were only needed to measure
        put = functools.partial(self._put_merged, merged.stored, storage, kept, id(self) in options.apart, bias)
        return StagedMerge(report, functools.partial(put, keeps=True, names=new))

    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Compute the weight without some adapters; without any, these are the original bits.

        Args:
            adapters: Adapters; those that are not merged here are ignored.

        Raises:
            MergeError: The base's values were not kept.
        """
        left = [name for name in self.merged_adapters if name not in adapters]
        if left == self.merged_adapters:
            return None
        stored, bias = self.stored_with(left), self._staged_bias(left)
        return StagedMerge(None, functools.partial(self._put_unmerged, stored, bias, left))

    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return the weight, and the bias if an adapter brings one, with adapters merged; the layer is not changed.

        Args:
            adapters: Adapters; those without a factor here are ignored.
            options: How they are merged; `dense` gives quantized weights as plain ones.

        Returns:
            Name of the parameter -> tensor (…); empty if no adapter has a factor here.

        Raises:
            MergeError: An adapter has no place in the weight, or its bias is not finite.
        """
        here = [name for name in adapters if name in self.r]
        if not here:
            return {}
        stored = sum_of_updates(self, here, options).stored
        found = {self.slot.parameter: stored}
        if isinstance(stored, nn.Module):
            found = {name: held.detach() for name, held in stored._parameters.items() if held is not None}
        bias = self.merged_bias(here)
        return found if bias is None else {**found, "bias": bias}

    def merged_bias(self, adapters: Sequence[str]) -> Tensor | None:
        """Return the base's bias, (out,), with those of adapters in it; None if none of them brings one.

        Args:
            adapters: Adapters; those without a factor here are ignored.

        Raises:
            MergeError: It would not be finite.
        """
        staged = self._staged_bias(adapters) if any(self.bias_of(name) is not None for name in adapters) else None
        return None if staged is None else staged.value

    def unload(self) -> nn.Module:
        """Return the base's module with what is merged in it; a base that another adapter moved is moved back."""
        if self.moved_by is not None and self.moved_by not in self.merged_adapters:
            self.moved_by = None
            self.place(self.stored_with(self.merged_adapters))
        return self.owner

    def follow(self, leader: BaseWeight) -> None:
        """Take over what was merged or unmerged at the layer that leads this one: they share one weight.

        Args:
            leader: A layer whose weight is this one's too, and whose factors this one uses.
        """
        self.merged_adapters = list(leader.merged_adapters)
        if self.merged_adapters or self.moved_by is None:
            self.kept = leader.kept if self.merged_adapters else None

    def stored_with(self, merged: Sequence[str]) -> Any:
        """Return what the base's module stores while these adapters are merged: the original if there are none."""
        if merged:
            return stored_with(self, merged)
        return self.moved_base() if self.moved_by is not None else self.original()

    def place(self, stored: Any) -> None:
        """Put what a merge or its undoing stores into the base: a module instead of the owner, or a weight into it."""
        if isinstance(stored, nn.Module):
            self.replaced = self.replaced or (self.owner,)
            self.base_layer = stored
            return
        base, source = self.storage
        base.place(source, self.slot.parameter, stored)
        if self.replaced:
            self.base_layer, self.replaced = self.replaced[0], ()

    def _write_unkept(self, new: Sequence[str], options: MergeOptions, bias: StagedBias | None) -> None:
        """Compute the merged weight again and put it in place; the original is not kept."""
        merged = weight_with(self, new, options)
        storage = merged.base, merged.source
        self._put_merged(merged.stored, storage, self.kept, id(self) in options.apart, bias, keeps=False, names=new)

    def _put_merged(
        self,
        stored: Any,
        storage: tuple[Base, nn.Module],
        kept: Any,
        apart: bool,
        bias: StagedBias | None,
        *,
        keeps: bool,
        names: Sequence[str],
    ) -> None:
        """Put a merged weight in place; if it is apart, in a parameter of this site's own."""
        (base, source), parameter = storage, self.slot.parameter
        self.kept = kept
        shared = self.owner._parameters.get(parameter) if apart and not base.quantised else None
        if shared is not None and not isinstance(stored, nn.Module):  # the other holder keeps the old one
            if keeps and self.tied_weight is None:
                self.tied_weight = shared
            self.owner._parameters[parameter] = nn.Parameter(stored, requires_grad=shared.requires_grad)
        else:
            if isinstance(stored, nn.Module) or self.replaced:
                self.place(stored)
            else:
                base.place(source, parameter, stored)
            if not keeps:
                self.replaced = ()
        self._put_bias(bias)
        self.merged_adapters = [*self.merged_adapters, *names]

    def _put_unmerged(self, stored: Any, bias: StagedBias | None, left: list[str]) -> None:
        if self.tied_weight is not None and not left:
            give_back(self.owner, self.slot.parameter, self.tied_weight, stored)
            self.tied_weight = None
        else:
            self.place(stored)
        self._put_bias(bias)
        self.merged_adapters = left
        if not left:
            self.kept = self.kept if self.moved_by is not None else None

    def _staged_bias(self, adapters: Sequence[str]) -> StagedBias | None:
        """The base's bias with those of adapters in it; None if nothing was or will be written to it.

        Raises:
            MergeError: It would not be finite.
        """
        bringing = [name for name in adapters if self.bias_of(name) is not None]
        if not bringing and self.kept_bias is None:
            return None
        old = self.original_bias()
        if old is None or not bringing:
            return None if old is None else StagedBias(old, None)
        with torch.no_grad():
            total = at_least_fp32(old).clone()
            for name in bringing:
                factor = self.factor(name)
                total += factor.bias.to(total.dtype) * factor.scale  # type: ignore[union-attr]
            if not bool(torch.isfinite(total).all()):
                raise MergeError(
                    f"NaNs detected in the merged weights: the bias of B of {', '.join(adapters)} is NaN or infinite. "
                    "Nothing was changed."
                )
            return StagedBias(total.to(old.dtype), old.detach())

    def _put_bias(self, staged: StagedBias | None) -> None:
        if staged is not None:
            self.kept_bias = staged.kept
            set_bias(self.owner, staged.value)


def _as_now(base: Base, source: nn.Module, parameter: str, stored: Any) -> Any:
    """What the base stored, or what it stores now if that is None, on the base's device and in its dtype."""
    if stored is not None and (base.quantised or not isinstance(stored, Tensor)):
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
