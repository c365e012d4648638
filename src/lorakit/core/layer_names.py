"""The empty subclasses of `LoraLayer`, one per kind: `isinstance` and `repr` say what people of the field expect."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.core.layer import LoraLayer
from lorakit.core.weightside import WeightSideLayer


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


class MultiheadAttention(WeightSideLayer):
    """A `LoraLayer` on the in-projection of an nn.MultiheadAttention."""


class InnerLinear(WeightSideLayer):
    """A `LoraLayer` on a dense layer whose weight the module around it reads."""

    def _get_name(self) -> str:
        return super()._get_name().replace("InnerLinear", "Linear")


class ParamWrapper(WeightSideLayer):
    """A `LoraLayer` on a bare parameter of a module."""


LAYERS: Mapping[str, type[LoraLayer]] = {
    "Linear": Linear,
    "Conv1D": Linear,
    "Embedding": Embedding,
    "Conv1d": Conv1d,
    "Conv2d": Conv2d,
    "Conv3d": Conv3d,
    "MultiheadAttention": MultiheadAttention,
    "Parameter": ParamWrapper,
    "InnerLinear": InnerLinear,
}
"""Kind -> the name that `isinstance` and `repr` show."""
