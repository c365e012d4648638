"""The base underneath its adapters: read its tensors, named and valued as before any merge, freeze it and restore it.

What is needed to undo the freezing of a module is stored in that module, without its parameters, which can be replaced
by shards. This module also replaces quantized modules with plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import PARAMETRISED
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.replication import replication_of
from lorakit.core.quantization import Stored, WeightFormat, allow_repacking, disable_repacking, weight_format_of

SAMPLES, TOLERANCE = 4096, 1e-2
"""Number of values to check per weight, and the largest acceptable relative error."""


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Replace every quantized module of a model without adapters with a plain one, in place; return their number.

    A plain module has the compute dtype of the quantized module or, if that has none, `dtype`, or else the model's.
    """
    dtype = dtype or float_dtype(model)
    plain = [(weight.packed.rpartition(".")[0], weight.dequantized(dtype)) for weight in quantized_weights(model)]
    for path, module in plain:
        model.set_submodule(path, module)
    return len(plain)


def check_quantized_weights(model: nn.Module) -> None:
    """Raise a ModelError if a part of a quantized weight is missing or not finite."""
    for path, module in AdapterIndex.of(model).plain_modules():
        weight_format_of(module).check(module, path)


def disable_base_repacking(model: nn.Module) -> None:
    """Keep quantized modules from rewriting their weights in forward passes, which some quantizers do by default."""
    disable_repacking(AdapterIndex.of(model).everything.values())


def wrong_dequantization(model: nn.Module) -> tuple[str, float] | None:
    """Find a weight that its quantization package dequantizes incorrectly, as some kernels do for certain shapes.

    One weight per format and shape is checked, at a few thousand positions. Return the weight's name and its largest
    error divided by its largest value, or None if all weights are correct.
    """
    seen = set()
    for weight in quantized_weights(model):
        if (weight.base.name, weight.shape) in seen:
            continue
        seen.add((weight.base.name, weight.shape))
        whole = weight.base.read(weight.module, weight.stored).reshape(-1)
        positions = torch.linspace(0, whole.numel() - 1, min(SAMPLES, whole.numel()), dtype=torch.float64).long()
        expected, bound = weight.base.values(weight.stored, positions)
        difference = (whole[positions.to(whole.device)] - expected).abs()[bound.isfinite()]
        error = float(difference.max() / whole.abs().max().clamp_min(1e-30)) if difference.numel() else 0.0
        if not error <= TOLERANCE:
            return weight.name, error
    return None


def base_tensors(model: nn.Module | AdapterIndex, *, stacked: bool = True) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Yield the base's parameters and buffers as they were before any merge, under their names in the plain base.

    With `stacked`, replicated layers (`layer_replication`) are included, otherwise the original ones.

    Yields:
        The name in the plain base, the tensor (…), and the module that holds the tensor. Shared parameters appear under
        each of their names; non-persistent buffers are left out.
    """
    index = AdapterIndex.of(model)
    layers = {(id(layer.source), layer.spec.parameter): layer for _, layer in index.layers()}
    tables = [table for _, table in index.every(TrainableTokens) if not table.follows and table.merged_adapters]
    unmerged = {id(t.original_module.weight): t.token_adapter.original(strict=False) for t in tables}
    if not stacked and replication_of(index) is not None:
        # a replicated layer and the original layer hold the same weight in different modules
        adapted = [(layer.source._parameters.get(layer.spec.parameter), layer) for layer in layers.values()]
        layers |= {(id(parameter), ""): layer for parameter, layer in adapted if parameter is not None}
    patches = [(patch.module, patch) for patch in index.bias_patches()]
    biases = {(id(module), name): old for module, patch in patches for name, old in patch.old(module).items()}
    for path, module in index.plain_modules(stacked):
        prefix = f"{path}." if path else ""
        parts = _original_parts(layers.get((id(module), "weight")))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                layer = layers.get((id(module), name)) or layers.get((id(parameter), ""))
                if name in parts:
                    tensor = parts[name]
                elif layer is not None:
                    tensor = layer.base.tensors(layer.original())[0]
                else:
                    layer = layers.get((id(module), "weight")) if name == "bias" else None
                    kept = None if layer is None or layer.kept_bias is None else layer.original_bias()
                    tensor = unmerged.get(id(parameter), parameter) if kept is None else kept
                    tensor = biases.get((id(module), name), tensor)
                yield prefix + name, tensor, module
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer, module


def _original_parts(layer: LoraLayer | None) -> dict[str, Tensor]:
    """Return the parameters (…) that make up a layer's quantized weight, by name, as they were before any merge."""
    names = () if layer is None else layer.base.part_names(layer.source)
    return dict(zip(names, layer.base.tensors(layer.original()), strict=True)) if layer is not None and names else {}


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight of the base, as it was before any merge.

    Attributes:
        name: Name of the weight in the plain base.
        packed: Name under which `base_tensors` yields the packed values.
        base: The weight's storage format.
        layer: The adapted layer around the module, or None.
        companions: Names under which `base_tensors` yields other parts of the weight, such as scales.
    """

    name: str
    packed: str
    module: nn.Module
    base: WeightFormat[Any, Any]
    stored: Stored
    layer: LoraLayer | None
    companions: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the canonical weight: (out, in)."""
        out_features, in_features = (int(getattr(self.module, name)) for name in ("out_features", "in_features"))
        return out_features, in_features

    @property
    def plain_bias(self) -> Tensor | None:
        """The module's bias (out,) before any merge, if the bias is a tensor but not a parameter; otherwise None."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, Tensor) or "bias" in self.module._parameters:
            return None
        return bias if self.layer is None else self.layer.original_bias()

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """Return the equivalent plain module in the quantized module's compute dtype or, without one, in `dtype`."""
        return self.base.dense(self.module, self.base.read(self.module, self.stored), dtype)


def quantized_weights(model: nn.Module | AdapterIndex, *, stacked: bool = True) -> Iterator[QuantizedWeight]:
    """Yield every quantized weight of the base; `stacked` is as in `base_tensors`."""
    index = AdapterIndex.of(model)
    layers = {id(layer.source): layer for _, layer in index.layers()}
    formats: dict[tuple[type, type], WeightFormat[Any, Any]] = {}
    for path, module in index.plain_modules(stacked):
        key = (type(module), type(module._parameters.get("weight")))
        if key not in formats:
            formats[key] = weight_format_of(module)
        base = formats[key]
        if base.quantized:
            prefix = f"{path}." if path else ""
            packed = next(name for name in ("weight", *module._parameters) if name in module._parameters)
            layer = layers.get(id(module))
            stored = layer.original() if layer is not None else base.stored(module, "weight")
            companions = tuple(prefix + name for name in base.part_names(module) if name != packed)
            yield QuantizedWeight(f"{prefix}weight", prefix + packed, module, base, stored, layer, companions)


def float_dtype(model: nn.Module | AdapterIndex) -> torch.dtype:
    """Return the base's compute dtype: the dtype of the first floating-point parameter in an unquantized module.

    Without one, it is the dtype of the first bias in a quantized module, or fp32.
    """
    of_bias: torch.dtype | None = None
    for name, tensor, module in base_tensors(model):
        attribute = name.rpartition(".")[2]
        if not tensor.is_floating_point() or attribute in module._buffers:  # buffers often stay in fp32
            continue
        if not weight_format_of(module).quantized:
            return tensor.dtype
        if of_bias is None and attribute == "bias":
            of_bias = tensor.dtype
    return of_bias or torch.float32


RECORD = "_lorakit_frozen"
"""Name of the attribute in which a base module stores its `FrozenModule`."""


@dataclass(frozen=True)
class FrozenModule:
    """What freezing changed in a module: the flags of its own parameters by name, and whether it repacked."""

    flags: Mapping[str, bool] = field(default_factory=dict)
    repacks: bool = False


def freeze_base(index: AdapterIndex) -> None:
    """Freeze the parameters of a base without adapters, and keep its modules from repacking their weights."""
    modules = list(index.everything.values())
    repacking = {id(module) for module in disable_repacking(modules)}
    for module in modules:
        flags = {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
        if flags or id(module) in repacking:
            module.__dict__[RECORD] = FrozenModule(flags, id(module) in repacking)
    for module in modules:  # only after all flags are known, because modules share parameters
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)


def unfreeze_base(index: AdapterIndex, plain: Mapping[nn.Module, nn.Module] = MappingProxyType({})) -> None:
    """Undo `freeze_base` after the last adapter was removed; `plain` maps a module to the one that replaced it."""
    for module in _base_modules(index):
        record: FrozenModule = module.__dict__.pop(RECORD, FrozenModule())
        for holder in {module, plain.get(module, module)}:
            _set_flags(holder, record.flags)
        if record.repacks:
            allow_repacking([module])


def _set_flags(module: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set the flags of a module's own parameters, which may have been pruned or parametrized since then."""
    for name, flag in flags.items():
        computed = getattr(module._modules.get(PARAMETRISED), name, None)
        stored = module._parameters.get(name, module._parameters.get(f"{name}_orig"))
        parameter = stored if computed is None else computed.original
        if parameter is not None:
            parameter.requires_grad_(flag)


def _base_modules(index: AdapterIndex) -> Iterator[nn.Module]:
    """Yield all modules of a model, and those that a merge replaced with plain ones."""
    yield from index.everything.values()
    for _, layer in index.layers():
        yield from layer.replaced
