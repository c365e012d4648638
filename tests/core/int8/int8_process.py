"""Quantize a model for int8 matmuls in one of several processes, each with its own batches, and save its state dict."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

from lorakit.core import quantize_base


def model() -> nn.Sequential:
    """Return a frozen model with the same weights in each process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).requires_grad_(False)


def run(module: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Run a model on the values of a batch."""
    module(batch["x"])


def batch(rank: int) -> dict[str, torch.Tensor]:
    """Return the batch of a process."""
    return {
        "x": torch.randn(8, 64, generator=torch.Generator().manual_seed(rank)),
        "input_ids": torch.zeros(2, 3 + rank),
    }


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    made = model()
    report = quantize_base(made, [batch(rank)], forward=run)
    torch.save((made.state_dict(), report.tokens), Path(sys.argv[1]) / f"{rank}.pt")
    distributed.destroy_process_group()
