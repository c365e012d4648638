"""Linear layers that multiply few rows faster and independently of each other, for decoding (`ops.linear.few_rows`).

The class of a module is changed to a subclass, in place. The module stays the same object with the same state, so
adapter layers, hooks and names are unaffected, and copies and pickled modules have the original class. A call that
records gradients, runs under autocast, has many rows or finds no kernel runs the original `forward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.linear import few_rows
from lorakit.speed.patching import pickled_as, walk


class Linear(nn.Linear):
    """An `nn.Linear` whose calls with few rows and without gradients run a kernel, if there is one."""

    __module__ = nn.Linear.__module__
    _replaced_class = nn.Linear  # `MARK`

    def forward(self, input: Tensor) -> Tensor:
        """Return x·Wᵀ + b (…, out) for x (…, in)."""
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(input.device.type):
            y = few_rows(input, self.weight, self.bias)
            if y is not None:
                return y
        return super().forward(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return pickled_as(nn.Linear, self)


def multiply_few_rows(model: nn.Module) -> int:
    """Make the linear layers of a model multiply few rows independently, except those inside adapters of peft.

    Outputs agree with those of PyTorch up to rounding. Layers that are added later need another call.

    Returns:
        The number of layers that were changed: those whose class is `nn.Linear`, not a subclass or a replacement.
    """
    found = [module for path, module in walk(model) if type(module) is nn.Linear and ".lora_" not in f".{path}"]
    for module in found:
        module.__class__ = Linear
    return len(found)


def undo_few_rows(model: nn.Module) -> None:
    """Undo `multiply_few_rows`."""
    for _, module in walk(model):
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # the same layout
