"""Optimizers that not every installation has: AdamW with 8-bit state, from bitsandbytes, and torch's Muon.

Only this file and `lorakit.core.quantization.bitsandbytes` import bitsandbytes. It stores the moments of a tensor with
at least 4096 elements as 8-bit codes with one fp32 scale per 256 elements; smaller tensors have fp32 moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from lorakit.choices import OPTIMIZERS
from lorakit.errors import MissingExtra, UsageError
from lorakit.plan.optimizer_state import SMALLEST_8BIT


def _without(name: str) -> tuple[str, ...]:
    return tuple(other for other in OPTIMIZERS if other != name)


def check_adamw8bit(device: torch.device) -> None:
    """Check that bitsandbytes is installed and can take an 8-bit step on a device, by taking one on a small tensor.

    Raises:
        MissingExtra: bitsandbytes is not installed.
        UsageError: bitsandbytes has no 8-bit optimizer for the device.
    """
    others, tensor = _without("adamw8bit"), nn.Parameter(torch.zeros(SMALLEST_8BIT, device=device))
    tensor.grad = torch.ones_like(tensor)
    optimizer = adamw8bit([{"params": [tensor]}], 1e-3)
    try:
        optimizer.step()
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as cause:  # it differs by version
        raise UsageError(
            f"optimizer adamw8bit is not available on {device.type} with the installed bitsandbytes ({cause}); use "
            f"--optimizer {' or '.join(others)}, or another --device.",
            what="adamw8bit",
            where=device.type,
            field="optimizer",
            allowed=others,
        ) from cause


def adamw8bit(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    """Build AdamW with 8-bit state for groups from `parameter_groups`.

    Raises:
        MissingExtra: bitsandbytes is not installed.

    Source:
        Dettmers et al. 2022, arXiv:2110.02861; betas 0.9 and 0.999, eps 1e-8.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as cause:
        text = "optimizer adamw8bit needs bitsandbytes; run pip install 'lorakit[quant]', or use --optimizer adamw."
        raise MissingExtra(text, what="bitsandbytes", field="optimizer", allowed=_without("adamw8bit")) from cause
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate, weight_decay=0.0)
    optimizer.register_step_post_hook(_note_writes)
    return optimizer


def _note_writes(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Increment the versions of the updated tensors, because bitsandbytes writes to them without autograd noticing."""
    for group in optimizer.param_groups:
        increment_version([parameter for parameter in group["params"] if parameter.grad is not None])


def check_muon(device: torch.device) -> None:
    """Check that torch has Muon.

    Raises:
        UsageError: The installed torch is older than 2.9.
    """
    others = _without("muon")
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(
            f"optimizer muon needs torch 2.9 or newer, but torch {torch.__version__} is installed; upgrade torch, or "
            f"use --optimizer {' or '.join(others)}.",
            what="muon",
            where=f"torch {torch.__version__}",
            field="optimizer",
            allowed=others,
        )


class Muon(torch.optim.Optimizer):
    """torch's Muon for matrices, and another optimizer for all other tensors, as one optimizer.   [docs/math.md (45)]

    The two optimizers share the parameter groups and the state of this one. Tensors without a gradient do not change.

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: momentum 0.95, Nesterov, 5 iterations; Liu et
        al. 2025, arXiv:2502.16982, section 2.2: an update with the RMS of AdamW's, so that both can share a rate.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: torch.optim.Optimizer | None, *, lr: float) -> None:
        """Set up the optimizer.

        Args:
            matrices: Parameter groups of 2-D tensors, from `lorakit.train.loop.optimizer.parameter_groups`.
            others: The optimizer of all other tensors, or None if there are none.
            lr: Learning rate for groups that do not set their own.
        """
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self._parts = [muon] if others is None else [muon, others]
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one optimizer step, and return the result of the closure, which computes the loss again, or None."""
        first, *others = self._parts
        loss = first.step(closure)  # before any update
        for part in others:
            part.step()
        return loss
