"""Torch's fast path of nn.TransformerEncoderLayer reads weights without calling their modules: adapters would not act.

Torch leaves that path alone where a child has a hook. One that does nothing is hung on the adapted children of such
layers; it goes with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakit.core.layering.layer import LoraLayer


def keep_off(modules: Iterable[nn.Module]) -> None:
    """Make every nn.TransformerEncoderLayer that holds adapted layers call them.

    Args:
        modules: The modules of a model.
    """
    for encoder in modules:
        if not isinstance(encoder, nn.TransformerEncoderLayer):
            continue
        for layer in encoder.modules():
            if isinstance(layer, LoraLayer) and _nothing not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook; it is a function of this module so that adapted models can be pickled."""
