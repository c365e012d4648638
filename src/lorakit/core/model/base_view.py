"""A dense layer in fewer bits, and a whole model back: which quantiser makes which of the words of `--quantization`.

For models that transformers does not load, and for storages that it cannot.

The base under the adapters: its tensors as they were before any merge, under the names of the plain model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import AdapterIndex
from lorakit.core.quantization import WeightFormat, disable_repacking, weight_format_of
from lorakit.core.quantization.bitsandbytes import eight_bit_linear, four_bit_linear
from lorakit.core.quantization.hqq import hqq_linear
from lorakit.core.quantization.torchao import int8_linear
from lorakit.plan.quantized import BLOCK, Quantization

PLACES, ROUNDING = 4096, 1e-2
"""At how many places a weight is checked, and what kernels may round, over its largest number."""


def multiply_out(model: nn.Module) -> int:
    """Put a plain module in the place of every quantised one of a model that has no adapters.

    Args:
        model: The model, changed in place; each plain weight has the dtype of the quantised one's products.

    Returns:
        How many modules were replaced.

    Raises:
        MergeError: A weight cannot be read.
    """
    dtype = float_dtype(model)
    plain = [(weight.packed.rpartition(".")[0], weight.multiplied_out(dtype)) for weight in quantised_weights(model)]
    for path, module in plain:
        model.set_submodule(path, module)
    return len(plain)


def hold_base_still(model: nn.Module) -> None:
    """Keep all modules of a model from rewriting their own weight in a forward, as those of some quantizers do.

    Args:
        model: A model without adapters; values stay as they are.
    """
    disable_repacking(AdapterIndex.of(model).everything.values())


def wrongly_multiplied_out(model: nn.Module) -> tuple[str, float] | None:
    """A weight whose package multiplies out other numbers than it packed, which a kernel may do for some widths.

    One weight of each shape is compared, at a few thousand places, with what the packed bytes mean.

    Args:
        model: A model with or without adapters.

    Returns:
        The weight's name and the largest difference over the largest number, or None where all is right.
    """
    seen = set()
    for weight in quantised_weights(model):
        module: Any = weight.module
        shape = (weight.base.name, module.out_features, module.in_features)
        if shape in seen:
            continue
        seen.add(shape)
        whole = weight.base.read(module, weight.stored).reshape(-1)
        places = torch.linspace(0, whole.numel() - 1, min(PLACES, whole.numel()), dtype=torch.float64).long()
        meant, bound = weight.base.values(weight.stored, places)
        difference = (whole[places.to(whole.device)] - meant).abs()[bound.isfinite()]
        error = float(difference.max() / whole.abs().max().clamp_min(1e-30)) if difference.numel() else 0.0
        if not error <= ROUNDING:
            return weight.name, error
    return None


def quantised_linear(linear: nn.Linear, wanted: Quantization) -> nn.Module:
    """A dense layer as a quantiser stores it.

    Args:
        linear: The layer; its dtype becomes that of the products. Its weight may be given up.
        wanted: How to store it.

    Returns:
        The layer to put in its place, in the same mode, frozen.
    """
    package, bits = wanted.storage.package, wanted.storage.bits
    if package == "hqq":
        return hqq_linear(linear, bits, BLOCK)
    if package == "torchao":
        return int8_linear(linear)
    if bits == 8:
        return eight_bit_linear(linear)
    return four_bit_linear(linear, wanted.name, wanted.double)


def base_tensors(model: nn.Module | AdapterIndex, *, stacked: bool = True) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """The base's own parameters and buffers as they were before any merge, under the base's own names.

    Args:
        model: A model with or without adapters.
        stacked: Layers that are stacked anew (`layer_replication`) as they stand; false gives the original ones.

    Yields:
        Name without any trace of adapters, tensor (…) of any shape, and the module that holds it. Shared
        parameters come once per name; buffers that are not saved are left out.
    """
    index = AdapterIndex.of(model)
    originals = {(id(layer.source), layer.slot.parameter): layer for _, layer in index.layers()}
    tables = _merged_tables(index)
    if not stacked and index.state is not None and index.state.replication is not None:
        # a copy's weight is that of its original, in another module
        originals |= {(id(parameter), ""): layer for parameter, layer in _shared(originals.values())}
    for path, module in index.plain_modules(stacked):
        old = _old_biases(module)
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                layer = originals.get((id(module), name)) or originals.get((id(parameter), ""))
                if layer is not None:
                    tensor = layer.base.tensors(layer.original())[0]
                elif name == "bias" and (id(module), "weight") in originals:
                    layer = originals[id(module), "weight"]
                    kept = None if layer.kept_bias is None else layer.original_bias()
                    tensor = old.get(name, parameter if kept is None else kept)
                else:
                    tensor = old.get(name, tables.get(id(parameter), parameter))
                yield prefix + name, tensor, module
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer, module


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight of the base that is stored in fewer bits, as it was before any merge.

    Attributes:
        name: The name that it has in the plain base.
        packed: The name of its packed numbers in `base_tensors`.
        module: The module that holds it.
        base: How it is stored.
        stored: What is stored.
        layer: The layer around the module, or None.
    """

    name: str
    packed: str
    module: nn.Module
    base: WeightFormat[Any, Any]
    stored: Any
    layer: LoraLayer | None

    @property
    def loose_bias(self) -> Tensor | None:
        """The module's bias, (out,), as it was before any merge, where it is no parameter of it."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, Tensor) or "bias" in self.module._parameters:
            return None
        return bias if self.layer is None else self.layer.original_bias()

    def multiplied_out(self, dtype: torch.dtype) -> nn.Module:
        """The plain module that computes the same, in the dtype of its products or, where it has none, in `dtype`."""
        return self.base.dense(self.module, self.base.read(self.module, self.stored), dtype)


def quantised_weights(model: nn.Module | AdapterIndex, *, stacked: bool = True) -> Iterator[QuantisedWeight]:
    """Every weight of a base that is stored in fewer bits.

    Args:
        model: A model with or without adapters.
        stacked: As `base_tensors`.
    """
    index = AdapterIndex.of(model)
    standing = {id(layer.source): layer for _, layer in index.layers()}
    rows: dict[tuple[type, type], WeightFormat[Any, Any]] = {}
    for path, module in index.plain_modules(stacked):
        key = (type(module), type(module._parameters.get("weight")))
        row = rows.setdefault(key, rows[key] if key in rows else weight_format_of(module))
        if row.quantized:
            prefix = f"{path}." if path else ""
            packed = next(name for name in ("weight", *module._parameters) if name in module._parameters)
            layer = standing.get(id(module))
            stored = layer.original() if layer is not None else row.stored(module, "weight")
            yield QuantisedWeight(f"{prefix}weight", prefix + packed, module, row, stored, layer)


def float_dtype(model: nn.Module | AdapterIndex) -> torch.dtype:
    """The dtype in which a base computes, as its first plain parameter of floats has it.

    Where all its weights are quantised, a bias beside one of them tells; without any, it is fp32.

    Args:
        model: A model with or without adapters.
    """
    beside: torch.dtype | None = None
    for name, tensor, module in base_tensors(model):
        if not tensor.is_floating_point():
            continue
        if not weight_format_of(module).quantized:
            return tensor.dtype
        if beside is None and name.rpartition(".")[2] == "bias":
            beside = tensor.dtype
    return beside or torch.float32


def _old_biases(module: nn.Module) -> dict[str, Tensor]:
    return {name: old for patch in BiasPatch.on(module) for name, old in patch.old(module).items()}


def _merged_tables(index: AdapterIndex) -> dict[int, Tensor]:
    """Return, by id of a table's weight into which rows are merged, the table without them, as far as kept."""
    tables = [table for _, table in index.every(TrainableTokens) if not table.follows and table.merged_adapters]
    return {id(t.original_module.weight): t.token_adapter.original(strict=False) for t in tables}


def _shared(standing: Iterable[LoraLayer]) -> list[tuple[nn.Parameter, LoraLayer]]:
    held = [(layer.source._parameters.get(layer.slot.parameter), layer) for layer in standing]
    return [(parameter, layer) for parameter, layer in held if parameter is not None]
