"""Saved modules (`modules_to_save`), and `Extras`: everything that an adapter trains in addition to its factors.

Saved modules, trainable tokens and trained biases are active whenever the adapter's factors are. The originals are
kept, so that `disable` and other adapters can use the base: a saved module is a copy alongside the original, and the
original value of a trained bias is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.kinds import kind_of
from lorakit.core.layers.adapter_component import AdapterModule, MergeOptions, ReplacingModule, StagedMerge
from lorakit.core.layers.bias import BiasPatch, out_projection
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.trainable_tokens import ChosenRows, TrainableTokens
from lorakit.core.quantization import weight_format_of
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.errors import ConfigError, ConfigTypeError, MergeError, RouteError, TargetError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class ModulesToSave(ReplacingModule):
    """A module with a trainable copy for each adapter that lists it in `modules_to_save`; the original is frozen.

    `merged_adapters` lists the adapter whose copy replaces the original, if there is one.
    """

    _what, _field = "a saved module", "modules_to_save"
    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, original: nn.Module, state: AdapterState) -> None:
        super().__init__(original.training, state)
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.modules_to_save.training = original.training
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"original_module", "modules_to_save"} or name.startswith("__"):
                raise
            return getattr(self._of(self.state.active() if self.own_route is None else self.own_route), name)

    def available_adapters(self) -> list[str]:
        """Return the adapters that have a copy of this module."""
        return list(self.modules_to_save)

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter's copy, or an empty list if the adapter has no copy."""
        return list(self.modules_to_save[adapter].parameters()) if adapter in self.modules_to_save else []

    def saved_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the state dict of an adapter's copy, or an empty dict if the adapter has no copy."""
        return dict(self.modules_to_save[adapter].state_dict()) if adapter in self.modules_to_save else {}

    def remove(self, adapter: str) -> nn.Module:
        """Remove an adapter's copy, if any; return this module, or the original if no copies are left."""
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]
        self.drop_override(adapter)
        return self if len(self.modules_to_save) else self.original_module

    def check_mergeable(self, path: str, adapters: Sequence[str]) -> None:
        """Raise a MergeError if several adapters have a copy here, because only one copy can replace the original."""
        here = [name for name in adapters if name in self.modules_to_save]
        if len(here) > 1:
            text = f"{here[0]} and {here[1]} each have their own copy of {path} (modules_to_save); merge one of them."
            raise MergeError(text, what=here[1], where=path, field="modules_to_save")

    def check_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> None:
        """Raise a MergeError if another copy already replaces the original."""
        self.check_not_merged(path, adapters)
        self.check_mergeable(path, [*self.merged_adapters, *adapters])

    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Prepare to replace the original with an adapter's copy; return None if no adapter has a copy."""
        new = [name for name in adapters if name in self.modules_to_save]
        return StagedMerge(None, partial(setattr, self, "merged_adapters", new)) if new else None

    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Prepare to restore the original; return None if none of the given adapters is merged."""
        merged = not set(adapters).isdisjoint(self.merged_adapters)
        return StagedMerge(None, partial(setattr, self, "merged_adapters", [])) if merged else None

    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return the state dict of the copy that replaces the original, or an empty dict if there is no copy."""
        found: dict[str, Tensor] = {}
        for name in adapters:
            found |= self.saved_tensors(name)
        return found

    def unload(self) -> nn.Module:
        """Return the merged copy, or the original if no copy is merged."""
        return self.modules_to_save[self.merged_adapters[0]] if self.merged_adapters else self.original_module

    def run_alike(self, route: Route, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the output of the module that a route selects; raise a RouteError if several copies are active."""
        return self._of(route)(*args, **kwargs)

    def _of(self, route: Route) -> nn.Module:
        copies = [name for name in route.names if name in self.modules_to_save]
        if len(copies) > 1:
            text = f"{' and '.join(copies)} are active together, but each has its own copy (modules_to_save); use one."
            raise RouteError(text, what=copies[1], field="modules_to_save")
        copies = copies or [name for name in self.merged_adapters if name in route.names]
        return self.modules_to_save[copies[0]] if copies else self.original_module


@dataclass(frozen=True)
class Extras:
    """Everything that a new adapter will train in addition to its factors; built before the adapter is attached.

    Attributes:
        copies: Path -> trainable copy of the module at that path.
        biases: Base modules, each with its current biases by name; empty for an attention module if only its output
            projection has trained biases.
        rows: Trainable token embeddings: the chosen rows of each embedding or head, and their values, (n, d).
        leaders: Path of a module -> path of the module to which it is tied.
    """

    copies: dict[str, nn.Module]
    biases: list[tuple[nn.Module, dict[str, Tensor]]]
    rows: tuple[tuple[ChosenRows, nn.Parameter], ...] = ()
    leaders: Mapping[str, str] = field(default_factory=dict)


def build_extras(modules: Mapping[str, nn.Module], sites: Collection[str], saved: Sequence[str], bias: str) -> Extras:
    """Build everything that an adapter trains in addition to its factors, without changing the model.

    A bias in a saved module is trained only in the module's copy.

    Args:
        modules: Path -> the base module, or the adapted or saved module that replaces it.
        sites: Paths of the adapter's sites.
        saved: Paths of the adapter's saved modules.
        bias: The config's `bias`: "none", "all", or "lora_only" (only the biases of the sites).

    Raises:
        TargetError: A module to save contains sites or saved modules of another adapter.
        ConfigError: A bias to train has adapters merged into it, belongs to a plain module that replaced the base
            module in a merge, or is not a parameter (HQQ).
    """
    copies = {path: trainable_copy(path, modules[path]) for path in saved}
    found = list(biased_modules(modules, sites, saved, bias))
    layers = {id(layer.owner): layer for layer in modules.values() if isinstance(layer, LoraLayer)} if found else {}
    for path, module, _ in found:
        _check_untouched(path, layers.get(id(module)))
    biases = [
        (module, {leaf: module.get_parameter(leaf).detach().clone() for leaf in names}) for _, module, names in found
    ]
    own = {id(module) for module, _ in biases}
    for current in modules.values() if biases else ():
        for _, module in _base_modules(current):
            reads_inside = isinstance(module, nn.MultiheadAttention) and id(out_projection(module)) in own
            if reads_inside and id(module) not in own:
                biases.append((module, {}))
                own.add(id(module))
    return Extras(copies, biases)


def _check_untouched(path: str, layer: LoraLayer | None) -> None:
    """Reject a bias that merged adapters have changed, because its original value is needed later."""
    if layer is not None and (layer.kept_bias is not None or layer.replaced):
        how = "with a bias of B (lora_bias)" if layer.kept_bias is not None else "with dense=True"
        merged = ", ".join(layer.merged_adapters)
        text = f"The bias at {path} cannot be trained while {merged} is merged there {how}; unmerge first."
        raise ConfigError(text, what=merged, where=path, field="bias")


def biased_modules(
    modules: Mapping[str, nn.Module], sites: Collection[str], saved: Sequence[str], bias: str
) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Yield the base modules whose biases an adapter trains, excluding saved modules and everything inside them.

    The arguments are those of `build_extras`.

    Yields:
        The module's path in the plain base model, the module, and the names of its bias parameters.

    Raises:
        ConfigError: A bias is not a parameter of its module.
    """
    copied = tuple(path + "." for path in saved)
    adapted = {*sites, *_read_by(modules, sites)} if bias == "lora_only" else set(modules)
    for path, current in modules.items() if bias != "none" else ():
        if path in saved or path.startswith(copied) or path not in adapted:
            continue
        for inner, module in _base_modules(current):
            names = [leaf for leaf, p in module._parameters.items() if p is not None and "bias" in leaf]
            # in adapted modules, PEFT trains only parameters named `bias`, not `in_proj_bias` of attention modules
            leaves = tuple(leaf for leaf in names if bias == "all" or leaf == "bias")
            if isinstance(vars(module).get("bias"), Tensor) and weight_format_of(module).quantized:
                stored = weight_format_of(module).name
                text = f"{path} is stored as {stored}, so its bias is not a parameter; set bias='none'."
                raise ConfigError(text, what=stored, where=path, field="bias")
            if leaves:
                yield f"{path}.{inner}" if inner else path, module, leaves


def _read_by(modules: Mapping[str, nn.Module], sites: Collection[str]) -> Iterator[str]:
    """Yield the paths of child modules that become sites together with the parent that reads their weights."""
    for path in sites:
        module = modules[path]
        kind = kind_of(type(module.owner if isinstance(module, LoraLayer) else module))
        yield from (f"{path}.{child}" for child in (() if kind is None else kind.inner))


def _base_modules(current: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base modules at one path, each with its relative path; for a saved module, yield all modules in it."""
    if isinstance(current, ModulesToSave):
        yield from current.original_module.named_modules()
    else:
        inner = current.original_module if isinstance(current, TrainableTokens) else current
        yield "", inner.owner if isinstance(inner, LoraLayer) else inner


def trainable_copy(path: str, current: nn.Module) -> nn.Module:
    """Return a trainable, dequantized copy of a module or of that in a `ModulesToSave`, without adapters.

    Raises:
        TargetError: The module contains sites or saved modules of another adapter.
        ConfigTypeError: The module is a container, which is never called directly.
    """
    original = current.original_module if isinstance(current, ModulesToSave) else current
    if isinstance(original, CONTAINERS):
        text = (
            f"modules_to_save cannot be applied to modules of type {type(original).__name__}: {path} itself is never "
            "called, so a copy of it would have no effect. Specify the modules inside it instead."
        )
        raise ConfigTypeError(text, what=type(original).__name__, where=path, field="modules_to_save")
    inside = list(original.modules())
    if any(isinstance(module, AdapterModule) for module in inside):
        text = f"modules_to_save names {path!r}, which contains modules of another adapter; change the targets of one."
        raise TargetError(text, what=path, where=path, field="modules_to_save")
    duplicate = _plain_copy(original, inside)
    for module in duplicate.modules():
        for patch in BiasPatch.on(module):
            patch.remove(patch.adapter)
    for parameter in duplicate.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return duplicate


def _plain_copy(module: nn.Module, inside: Iterable[nn.Module]) -> nn.Module:
    """Return a dequantized copy of a module, given all modules inside it; its patches keep the state of the model."""
    states = {id(patch.state): patch.state for part in inside for patch in BiasPatch.on(part)}
    return _plain(copy.deepcopy(module, states))


def _plain(module: nn.Module) -> nn.Module:
    """Dequantize a module and its submodules; if the module itself is not quantized, it is changed in place."""
    row = weight_format_of(module)
    if row.quantized:
        return row.dense(module, row.read(module, row.stored(module, "weight")), torch.float32)
    for name, child in module._modules.items():
        module._modules[name] = None if child is None else _plain(child)
    return module


def plain_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return a dict from name to shape for all tensors of a module's trainable copy, which is not quantized."""
    parts = [part for _, part in module.named_modules()]
    is_quantized = any(weight_format_of(part).quantized for part in parts)
    plain = _plain_copy(module, parts) if is_quantized else module
    return {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
