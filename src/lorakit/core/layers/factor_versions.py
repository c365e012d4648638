"""The versions of adapters' factors in a layer, by which cached copies of them are known to be valid.

Writes to existing memory through `.data` cannot be detected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

from lorakit.core.layers.stored_weight import StoredWeight

_VERSION, _TRAINING = attrgetter("_version"), attrgetter("training")
_WEIGHT, _BIAS = itemgetter("weight"), itemgetter("bias")
_ADDRESS = Tensor.__base__.data_ptr  # type: ignore[union-attr]  # the C method that Tensor inherits


class FactorVersions:
    """The versions of adapters' factors in a layer; the tensors are kept alive so that their ids cannot be reused.

    Raises:
        KeyError: A factor belongs to another layer.
        RuntimeError: A factor's tensors were created in inference mode and therefore have no versions.
        AttributeError: A factor's module lacks an expected attribute.
    """

    def __init__(self, layer: StoredWeight, names: Sequence[str]) -> None:
        self._pick = pick = _picker(names)
        inside = layer._modules
        down, up = (inside[holder] for holder in layer.kind.names)
        self._holders, dropouts = (*layer.kind.names, "lora_dropout"), pick(inside["lora_dropout"]._modules)
        self._modules = pick(down._modules), pick(up._modules), dropouts
        sides = (*self._modules[0], *self._modules[1])
        self._hooks = [hooks for one in sides for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._down, self._up = ([module._parameters for module in side] for side in self._modules[:2])
        self._modes = [module for module in dropouts if type(module) is not nn.Identity]
        self._tensors = self._look()
        self._numbers = self._count(layer, self._tensors)

    def still(self, layer: StoredWeight) -> bool:
        """Return whether the factors' modules and their hooks, tensors, modes, scales and variants are unchanged."""
        pick, inside = self._pick, layer._modules
        try:
            for holder, modules in zip(self._holders, self._modules, strict=True):
                if pick(inside[holder]._modules) != modules:  # tuples of identical objects compare fast
                    return False
            tensors = self._look()
            return all(map(is_, tensors, self._tensors)) and self._count(layer, tensors) == self._numbers
        except (KeyError, RuntimeError, AttributeError):
            return False

    def _look(self) -> list[Any]:
        """Return every adapter's A, then every B, then every bias of B (None if B has no bias)."""
        return [*map(_WEIGHT, self._down), *map(_WEIGHT, self._up), *map(_BIAS, self._up)]

    def _count(self, layer: StoredWeight, tensors: list[Any]) -> list[Any]:
        weights = tensors[: 2 * len(self._up)]
        pick = self._pick
        return [
            *map(_VERSION, weights),
            *map(_ADDRESS, weights),
            *map(_TRAINING, self._modes),
            [*map(len, self._hooks)] if any(self._hooks) else None,
            pick(layer.scaling),
            pick(layer.variant),
        ]


def _picker(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that looks up the given names in a mapping and returns a tuple, even for a single name."""
    if len(names) > 1:
        return itemgetter(*names)
    (name,) = names
    return lambda mapping: (mapping[name],)
