"""Everything in a model that merging asks about, found by one walk: components, trained biases, and who holds what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from lorakit.core.layers.adapter_component import AdapterComponent, AdapterModule
from lorakit.core.layers.base_weight import BaseWeight
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.base_view import identity
from lorakit.core.model.index import state_of
from lorakit.core.model.ties import of_one_weight
from lorakit.core.routing.state import AdapterState


@dataclass
class Components:
    """What one walk over an adapted model finds.

    Attributes:
        model: The model.
        state: What its adapted modules share.
        modules: Path -> module that carries adapters, in the model's order.
        patches: Path of a module of the base -> the biases of it that adapters train in place.
        parents: Every (parent, attribute) that holds such a module.
        plain: Path in the plain base, and module of the base; one that stands in two places comes twice.
    """

    model: nn.Module
    state: AdapterState
    modules: dict[str, AdapterModule] = field(default_factory=dict)
    patches: dict[str, list[BiasPatch]] = field(default_factory=dict)
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    plain: list[tuple[str, nn.Module]] = field(default_factory=list)
    _led: dict[tuple[str, ...], dict[LoraLayer, LoraLayer]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Components:
        """Walk over a model once.

        Args:
            model: An adapted model.

        Raises:
            AdapterError: It has no adapters, or parts of it were adapted apart.
        """
        found = cls(model, state_of(model))
        found._visit(model, "", "", set())
        return found

    def components(self) -> Iterator[tuple[str, AdapterComponent]]:
        """Yield paths and components: the modules in the model's order, then the trained biases."""
        yield from self.modules.items()
        for path, patches in self.patches.items():
            yield from ((path, patch) for patch in patches)

    @cached_property
    def holders(self) -> dict[int, list[tuple[str, nn.Module]]]:
        """`identity` of a weight of the base -> names and modules that hold it; several if it is tied."""
        found: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, module in self.plain:
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found.setdefault(identity(parameter), []).append((prefix + name, module))
        return found

    def layers(self, adapters: Sequence[str] | None = None) -> Iterator[tuple[str, LoraLayer]]:
        """Yield paths and adapted layers: all of them, or those with a factor of one of some adapters."""
        for path, module in self.modules.items():
            if isinstance(module, LoraLayer) and (adapters is None or any(name in module.r for name in adapters)):
                yield path, module

    def copies(self) -> Iterator[tuple[str, ModulesToSave]]:
        """Yield paths and modules with trained copies."""
        for path, module in self.modules.items():
            if isinstance(module, ModulesToSave):
                yield path, module

    def tables(self) -> Iterator[tuple[str, TrainableTokens]]:
        """Yield paths and tables with trained rows, also those that follow another one."""
        for path, module in self.modules.items():
            if isinstance(module, TrainableTokens):
                yield path, module

    def followers(self, adapters: Sequence[str]) -> dict[LoraLayer, LoraLayer]:
        """Return the layers that are led in every one of some adapters -> the layers that lead them; one weight."""
        key = tuple(adapters)
        if key not in self._led:
            self._led[key] = dict(of_one_weight(self.layers(adapters), adapters))
        return self._led[key]

    def leading_tables(self) -> dict[TrainableTokens, list[TrainableTokens]]:
        """Return the tables that lead -> those that follow their rows."""
        tables = [table for _, table in self.tables()]
        return {table: [other for other in tables if table.leads(other)] for table in tables if not table.follows}

    def _visit(self, module: nn.Module, path: str, plain: str, seen: set[int]) -> None:
        """Note a module, what is around it and what is inside it; one that stands in two places is visited twice.

        Args:
            module: The module.
            path: Its path in the model.
            plain: Its path in the base without adapters.
            seen: The ids of the modules that were noted.
        """
        while isinstance(module, AdapterModule):
            if id(module) not in seen:
                seen.add(id(module))
                self.modules[path] = module
            if isinstance(module, BaseWeight):
                inside: nn.Module = module._modules["base_layer"]  # type: ignore[assignment]
                path += ".base_layer" if path else "base_layer"
                module = module.replaced[0] if module.replaced and not isinstance(inside, BaseWeight) else inside
            else:
                path += ".original_module" if isinstance(module, ModulesToSave) else ".token_adapter.base_layer"
                module = module.original_module  # type: ignore[assignment]
        if id(module) not in seen:
            seen.add(id(module))
            patches = BiasPatch.on(module)
            if patches:
                self.patches[path] = patches
        self.plain.append((plain, module))
        prefix = f"{plain}." if plain else ""
        path = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                if isinstance(child, AdapterModule):
                    self.parents.append((module, name))
                self._visit(child, path + name, prefix + name, seen)
