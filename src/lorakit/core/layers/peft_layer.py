"""`FieldLayer`: a `LoraLayer` with the methods and attributes that programs of the field call on PEFT's layers.

Each is a line or two over what the layer and `merging` have; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import scale
from lorakit.core.factor import TRAINED
from lorakit.core.kinds import Kind, Slot
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.merging.merging import merge, unmerge
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.core.variants import Factor, asked_for, own_tensors, variant_named
from lorakit.errors import ConfigTypeError, warn_caller


def _tables_of_variants() -> list[str]:
    """Return PEFT's names of tables by adapter in which its layers say of which variant an adapter is."""
    return [word for variant in asked_for() for word in variant.peft_names]


class FieldLayer(LoraLayer):
    """A `LoraLayer` as programs of the field know it; variants add tables by adapter (`Variant.peft_names`).

    Attributes:
        use_rslora: Adapter -> whether its scale is that of rsLoRA.
        lora_bias: Adapter -> whether its B has a bias here.
        frozen_peft_weight_names: Adapter -> attributes whose numbers its init froze (MiCA); others are not in it.
        other_param_names: Attributes that hold numbers per adapter.
        cast_input_dtype_enabled: Accepted; the arithmetic here casts by itself.
    """

    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    frozen_peft_weight_names: dict[str, tuple[str, ...]]
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "scaling", "lora_dropout")
    cast_input_dtype_enabled: bool = True

    def __init__(self, base_layer: nn.Module, kind: Kind, slot: Slot, state: AdapterState) -> None:
        super().__init__(base_layer, kind, slot, state)
        tables: dict[str, Any] = {word: {} for word in _tables_of_variants()}
        self.__dict__.update(tables, use_rslora={}, lora_bias={}, frozen_peft_weight_names={})

    def put(self, name: str, factor: Factor, r: int, lora_alpha: float, trains: frozenset[str]) -> None:
        """Add an adapter's factor; see `LoraLayer.put` for shapes such as A (r, in)."""
        super().put(name, factor, r, lora_alpha, trains)
        self.lora_bias[name] = factor.bias is not None
        for word in _tables_of_variants():
            value = factor.variant.peft_names.get(word)
            self.__dict__[word][name] = value is not None and value(factor)
        self.use_rslora[name] = name in self.state.configs and self.state.configs[name].use_rslora
        frozen = tuple(held for part, held in zip("AB", self.kind.names, strict=True) if part not in trains)
        if frozen:
            self.frozen_peft_weight_names[name] = frozen

    def remove(self, name: str) -> None:
        """Drop an adapter's factor; one that is not here is no matter."""
        super().remove(name)
        of_variants = [self.__dict__[word] for word in _tables_of_variants()]
        for table in (*of_variants, self.use_rslora, self.lora_bias, self.frozen_peft_weight_names):
            table.pop(name, None)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Attributes that hold parameters per adapter."""
        return tuple(name for name in (*TRAINED, *(own.held_as for own in own_tensors())) if name in self._modules)

    @property
    def in_features(self) -> int:
        """Columns of the base weight; of an embedding, its rows of the table; of a convolution, its input channels."""
        return self.slot.in_features

    @property
    def out_features(self) -> int:
        """Rows of the base weight: width of the output."""
        return self.slot.out_features

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base weight lies as (in, out)."""
        return self.base.transposed

    @property
    def merged(self) -> bool:
        """Whether an adapter is written into the base weight now."""
        return bool(self.merged_adapters)

    def get_base_layer(self) -> nn.Module:
        """The base's own module."""
        return self.owner

    def get_base_weight(self) -> Tensor:
        """The base weight as it is now, (out, in) or as it lies, as numbers."""
        base, owner = self.base, self.owner
        stored = base.stored(owner, self.slot.parameter)
        return base.read(owner, stored) if base.quantised else stored

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let an adapter act so many times as strongly as its config says.

        Args:
            adapter: The adapter; one that has nothing here is no matter.
            scale: The factor on its own scale.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._own_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Let the active adapters act so many times as strongly as now.

        Args:
            scale: The factor on their scales.
        """
        for name in self.active_adapters if scale != 1 else ():
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`, or give the active adapters back what their config says.

        Args:
            scale: What `scale_layer` was given; None means the config's.
        """
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._own_scale(name) if scale is None else self.scaling[name] / scale

    def _own_scale(self, adapter: str) -> float:
        return scale(self.r[adapter], self.lora_alpha[adapter], self.use_rslora.get(adapter, False))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter's B·A adds to the base weight, in the shape in which that lies.

        Args:
            adapter: An adapter that has a factor here.

        Returns:
            (out, in), or (in, out) where the weight lies so; it has a graph where gradients are on.

        Raises:
            MergeError: It has no place in a weight of this shape.
        """
        factor = self.factor(adapter)
        delta = self.kind.delta(self.slot, *factor.multiplied()) * factor.scale
        return delta.transpose(0, 1) if self.base.transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write adapters into the base weight of this layer alone; the original is kept.

        Args:
            safe_merge: Accepted and always true: a merge that is not finite is refused.
            adapter_names: Which; None means the active ones.

        Raises:
            ConfigTypeError: The names are one string.
            MergeError: An adapter cannot be merged.
            AdapterError: There is no such adapter.
        """
        if isinstance(adapter_names, str):
            raise ConfigTypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        asked = self.active_adapters if adapter_names is None else list(adapter_names)
        fresh = [name for name in asked if name not in self.merged_adapters]
        if self.merged_adapters:
            warn_caller(
                f"Already following adapters were merged {','.join(self.merged_adapters)}. You are now additionally "
                f"merging {','.join(fresh)}."
                if fresh
                else "All adapters are already merged, nothing to do."
            )
        active, default, joined = self.active_adapters, self.state.default, self.state._joined
        here = [name for name in fresh if name in self.r or name not in self.state.configs]
        if here:
            merge(self, *here)
            self.state.default, self.state._joined = default, joined
            if set(here) - set(active):  # elsewhere the model goes on as it was
                self.own_route = Route((*active, *(name for name in here if name not in active)))

    def unmerge(self) -> None:
        """Take every merged adapter out of this layer's weight, to the very bit."""
        if not self.merged_adapters:
            warn_caller("Already unmerged. Nothing to do.")
            return
        default, joined = self.state.default, self.state._joined
        unmerge(self)
        self.state.default, self.state._joined = default, joined

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter's update here can be written as plain LoRA.

        Args:
            adapter_name: The adapter.
        """
        return adapter_name not in self.r or variant_named(self.variant[adapter_name]).update is not None

    def _all_available_adapter_names(self) -> list[str]:
        """PEFT's name for `available_adapters`, sorted."""
        return sorted(self.available_adapters())

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """PEFT's step before A; the arithmetic here casts by itself."""
        return x if x is None or not self.cast_input_dtype_enabled else x.to(dtype)
