"""What adapters of one site were when something was made of them, and whether they still are: asked for each token.

A write through `.data` into the same memory leaves no trace and is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

_VERSION, _TRAINING = attrgetter("_version"), attrgetter("training")
_WEIGHT, _BIAS = itemgetter("weight"), itemgetter("bias")
_ADDRESS = Tensor.__base__.data_ptr  # type: ignore[union-attr]  # Tensor's own looks for overrides first


class Seen:
    """Some adapters of a layer as they are now; what it remembers it also holds, so that none of it can be another.

    Args:
        layer: The site's `LoraLayer`.
        names: The adapters, which have a factor there.

    Raises:
        KeyError: A factor is another layer's.
        RuntimeError: Its tensors count no versions, being made in inference mode.
        AttributeError: It has another form.
    """

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        self._pick = pick = _picker(names)
        down, up = (layer._modules[holder] for holder in layer.kind.names)
        self._holders, dropouts = (*layer.kind.names, "lora_dropout"), pick(layer._modules["lora_dropout"]._modules)
        self._modules = pick(down._modules), pick(up._modules), dropouts
        self._down, self._up = ([module._parameters for module in side] for side in self._modules[:2])
        self._modes = [module for module in dropouts if type(module) is not nn.Identity]
        self._tensors = self._look()
        self._numbers = self._count(layer, self._tensors)

    def still(self, layer: Any) -> bool:
        """Whether the adapters are the same modules and tensors, in the same place, unwritten, and act the same."""
        pick, inside = self._pick, layer._modules
        try:
            for holder, modules in zip(self._holders, self._modules, strict=True):
                if pick(inside[holder]._modules) != modules:  # tuples of the same things are equal without a look
                    return False
            tensors = self._look()
            return all(map(is_, tensors, self._tensors)) and self._count(layer, tensors) == self._numbers
        except (KeyError, RuntimeError, AttributeError):
            return False

    def _look(self) -> list[Any]:
        """A and B of each, and B's biases, which are none."""
        return [*map(_WEIGHT, self._down), *map(_WEIGHT, self._up), *map(_BIAS, self._up)]

    def _count(self, layer: Any, tensors: list[Any]) -> list[Any]:
        weights = tensors[: 2 * len(self._up)]
        pick = self._pick
        return [
            *map(_VERSION, weights),
            *map(_ADDRESS, weights),
            *map(_TRAINING, self._modes),
            pick(layer.scaling),
            pick(layer.variant),
        ]


def _picker(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes the values of these names out of a mapping, always as a tuple."""
    if len(names) > 1:
        return itemgetter(*names)
    (name,) = names
    return lambda mapping: (mapping[name],)
