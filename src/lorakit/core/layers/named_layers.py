"""Subclasses of `LoraLayer`, one per kind, with the class names that PEFT users expect in `isinstance` and `repr`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorakit.core.kinds import Kind
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.weight_layer import WeightLayer
from lorakit.core.routing.state import resolve
from lorakit.errors import ConfigError
from lorakit.targets.layer_types import ATTENTION, CONVOLUTIONS, DENSE, EMBEDDING, INNER_LINEAR, PARAMETER


class Linear(LoraLayer):
    """A `LoraLayer` for a dense layer (nn.Linear or transformers' Conv1D)."""


class Embedding(LoraLayer):
    """A `LoraLayer` for an nn.Embedding."""


class Conv1d(LoraLayer):
    """A `LoraLayer` for an nn.Conv1d."""


class Conv2d(LoraLayer):
    """A `LoraLayer` for an nn.Conv2d."""


class Conv3d(LoraLayer):
    """A `LoraLayer` for an nn.Conv3d."""


class MultiheadAttention(WeightLayer):
    """A `LoraLayer` for the input projection of an nn.MultiheadAttention."""

    @property
    def out_proj(self) -> nn.Module:
        """The output projection without adapters, as in PEFT; `base_layer.out_proj` is its adapted layer."""
        found = self.base_layer.get_submodule("out_proj")
        return found.get_base_layer() if isinstance(found, LoraLayer) else found

    def _restore_weights(self) -> None:
        """Do nothing: PEFT's method undoes merges made during a forward pass, but lorakit makes none."""


class InnerLinear(WeightLayer):
    """A `LoraLayer` for a dense layer whose weight is read directly by its parent module."""

    @property
    def weight(self) -> Tensor:
        """The weight with the updates of the active adapters, (out, in), which the parent module reads."""
        route, again = resolve(self.state, self.own_route, self.forwards)
        found = self.effective(self.without_rows(route))
        if found is None:
            found = self.base_layer.get_parameter("weight")
        self.forwards.note(found, route, again)
        return found

    def _get_name(self) -> str:
        return super()._get_name().replace("InnerLinear", "Linear")


class ParamWrapper(WeightLayer):
    """A `LoraLayer` for a bare parameter of a module."""

    @property
    def parameter_name(self) -> str:
        """Name of the parameter in the module."""
        return self.spec.parameter

    def extra_repr(self) -> str:
        """Return the parameter's name for `repr`, because several layers can wrap one module."""
        return f"parameter_name={self.parameter_name!r},"


LAYERS: Mapping[str, type[LoraLayer]] = {
    **dict.fromkeys(DENSE, Linear),
    EMBEDDING: Embedding,
    **dict(zip(CONVOLUTIONS, (Conv1d, Conv2d, Conv3d), strict=True)),
    ATTENTION: MultiheadAttention,
    PARAMETER: ParamWrapper,
    INNER_LINEAR: InnerLinear,
}
"""Name of a kind -> layer class."""


def layer_class(kind: Kind) -> type[LoraLayer]:
    """Return the layer class for a kind: the kind's `layer`, its entry in LAYERS, or else a generic class.

    Raises:
        ConfigError: The kind's `layer` is not a subclass of `LoraLayer`.
    """
    own = kind.layer or LAYERS.get(kind.name)
    if own is None:
        return WeightLayer if kind.acts_on == "weight" else LoraLayer
    if not issubclass(own, LoraLayer):
        raise ConfigError.of("kinds", own.__name__, f"a subclass of LoraLayer, for the layers of {kind.name}")
    return own
