"""What merging asks of the index of a model: components, trained biases, ties, and who holds what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from lorakit.core.layers.adapter_component import AdapterComponent, AdapterModule
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.ties import of_one_weight
from lorakit.core.routing.state import AdapterState


@dataclass
class Components:
    """What merging asks of a model, over the one index of the call.

    Attributes:
        index: The model's index.
        state: What its adapted modules share.
    """

    index: AdapterIndex
    state: AdapterState
    _led: dict[tuple[str, ...], dict[LoraLayer, LoraLayer]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module | AdapterIndex) -> Components:
        """Walk a model once; an index is not walked again.

        Args:
            model: An adapted model, or its index.

        Raises:
            AdapterError: It has no adapters, or parts of it were adapted apart.
        """
        index = AdapterIndex.of(model)
        return cls(index, index.known_state())

    @property
    def modules(self) -> dict[str, AdapterModule]:
        """Path -> module that carries adapters, in the model's order."""
        return self.index.components

    @property
    def patches(self) -> dict[str, list[BiasPatch]]:
        """Path of a module of the base -> the biases of it that adapters train in place."""
        return self.index.patches

    @property
    def holders(self) -> dict[int, list[tuple[str, nn.Module]]]:
        """`identity` of a weight of the base -> names and modules that hold it; several if it is tied."""
        return self.index.holders

    def components(self) -> Iterator[tuple[str, AdapterComponent]]:
        """Yield paths and components: the modules in the model's order, then the trained biases."""
        yield from self.modules.items()
        for path, patches in self.patches.items():
            yield from ((path, patch) for patch in patches)

    def layers(self, adapters: Sequence[str] | None = None) -> Iterator[tuple[str, LoraLayer]]:
        """Yield paths and adapted layers: all of them, or those with a factor of one of some adapters."""
        for path, module in self.modules.items():
            if isinstance(module, LoraLayer) and (adapters is None or any(name in module.r for name in adapters)):
                yield path, module

    def copies(self) -> Iterator[tuple[str, ModulesToSave]]:
        """Return paths and modules with trained copies."""
        return self.index.every(ModulesToSave)

    def tables(self) -> Iterator[tuple[str, TrainableTokens]]:
        """Return paths and tables with trained rows, also those that follow another one."""
        return self.index.every(TrainableTokens)

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
