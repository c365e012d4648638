"""The operands of the LoRA layers that the package `peft` made, told by their attributes; it is not imported.

Everything is asked anew at every call: which adapter is active, whether it is switched off or merged, its scale. What
is anything but one plain adapter gives None, and the layer runs itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.core.layering.operands import frozen_linear
from lorakit.core.layering.watched import is_watched, share_dropped
from lorakit.ops.adapted import Adapted, LowRank

FORWARD = ("peft.tuners.lora.layer", "Linear.forward")
"""Module and name of the forward whose arithmetic is known; a stand-in's has the same."""

TABLES = ("lora_A", "lora_B", "lora_dropout", "scaling")
"""What such a layer keeps by adapter."""

ODD_TABLES = ("lora_variant", "lora_bias", "use_dora")
"""Tables, of this peft or of older ones, in which a true entry means that the adapter is not plain."""


def is_peft_linear(module: nn.Module) -> bool:
    """Whether a module is peft's LoRA layer around a linear one."""
    forward: Any = type(module).forward
    return (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")) == FORWARD


def peft_operand(module: Any) -> Adapted | None:
    """The operands of a layer of peft's as it acts now.

    Args:
        module: A module of which `is_peft_linear` is true.

    Returns:
        W (out, in) or (in, out), bias (out,) and perhaps A (r, in) and B (out, r); None where it is not that simple.
    """
    if is_watched(module) or not all(hasattr(module, name) for name in TABLES) or module.merged:
        return None
    base = module.base_layer
    found = None if is_watched(base) else frozen_linear(base)
    names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if found is None or not names:
        return found
    if len(names) > 1 or any(_entry(getattr(module, table, None), names[0]) for table in ODD_TABLES):
        return None
    down, up, dropout = (getattr(module, table)[names[0]] for table in TABLES[:3])
    if any(type(part) is not nn.Linear or is_watched(part) or part.bias is not None for part in (down, up)):
        return None
    p, scale = share_dropped(dropout), module.scaling[names[0]]
    if p is None or not isinstance(scale, (int, float)):
        return None
    return Adapted(found.W, found.bias, LowRank(down.weight, up.weight, float(scale), p), found.transposed)


def _entry(table: Any, name: str) -> bool:
    return bool(table.get(name)) if isinstance(table, dict) else bool(table)
