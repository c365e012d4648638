"""The empty subclasses of `LoraLayer`, one per kind: `isinstance` and `repr` say what people of the field expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.core.kinds import Kind
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.weight_layer import WeightLayer
from lorakit.targets.layer_types import ATTENTION, CONVOLUTIONS, DENSE, EMBEDDING, INNER_LINEAR, PARAMETER


class Linear(LoraLayer):
    """A `LoraLayer` on a dense layer (nn.Linear or transformers' Conv1D)."""


class Embedding(LoraLayer):
    """A `LoraLayer` on an nn.Embedding."""


class Conv1d(LoraLayer):
    """A `LoraLayer` on an nn.Conv1d."""


class Conv2d(LoraLayer):
    """A `LoraLayer` on an nn.Conv2d."""


class Conv3d(LoraLayer):
    """A `LoraLayer` on an nn.Conv3d."""


class MultiheadAttention(WeightLayer):
    """A `LoraLayer` on the in-projection of an nn.MultiheadAttention."""

    def _restore_weights(self) -> None:
        """PEFT's step after its forward merged; here no forward writes to the base, so nothing is to be restored."""


class InnerLinear(WeightLayer):
    """A `LoraLayer` on a dense layer whose weight the module around it reads."""

    def _get_name(self) -> str:
        return super()._get_name().replace("InnerLinear", "Linear")


class ParamWrapper(WeightLayer):
    """A `LoraLayer` on a bare parameter of a module."""

    @property
    def parameter_name(self) -> str:
        """Name of the parameter in the module."""
        return self.slot.parameter

    def extra_repr(self) -> str:
        """What `repr` shows first: layers of several parameters stand around one module."""
        return f"parameter_name={self.parameter_name!r},"


LAYERS: Mapping[str, type[LoraLayer]] = {
    **dict.fromkeys(DENSE, Linear),
    EMBEDDING: Embedding,
    **dict(zip(CONVOLUTIONS, (Conv1d, Conv2d, Conv3d), strict=True)),
    ATTENTION: MultiheadAttention,
    PARAMETER: ParamWrapper,
    INNER_LINEAR: InnerLinear,
}
"""Kind -> the name that `isinstance` and `repr` show."""


def layer_class(kind: Kind) -> type[LoraLayer]:
    """The class of the layers of a kind: the one it brings, the table's, or, of a user's own, the one for its side.

    Args:
        kind: The kind.
    """
    if kind.layer is not None:
        made: Any = kind.layer
        return made
    return LAYERS.get(kind.name) or (WeightLayer if kind.acts_on == "weight" else LoraLayer)
