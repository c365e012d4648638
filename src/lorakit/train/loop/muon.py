"""Muon for the matrices of an adapter, combined with another optimizer for all other tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakit.choices import OPTIMIZERS
from lorakit.errors import UsageError

INSTEAD = tuple(name for name in OPTIMIZERS if name != "muon")
"""The optimizers that do not need torch 2.9."""


def check_muon(device: torch.device) -> None:
    """Check that torch has Muon.

    Raises:
        UsageError: The installed torch is older than 2.9.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(
            f"optimizer muon needs torch 2.9 or newer, but torch {torch.__version__} is installed; upgrade torch, or "
            f"use --optimizer {' or '.join(INSTEAD)}.",
            what="muon",
            where=f"torch {torch.__version__}",
            field="optimizer",
            allowed=INSTEAD,
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
