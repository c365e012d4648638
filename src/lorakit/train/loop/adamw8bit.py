"""AdamW from bitsandbytes, with 8-bit state.

Only this file and `lorakit.core.quantization.bitsandbytes` import bitsandbytes. The moments of a tensor with at least
4096 elements are stored as 8-bit codes with one fp32 scale per 256 elements; smaller tensors have fp32 moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from lorakit.choices import OPTIMIZERS
from lorakit.errors import MissingExtra, UsageError
from lorakit.plan.optimizer_state import SMALLEST_8BIT

INSTEAD = tuple(name for name in OPTIMIZERS if name != "adamw8bit")
"""The optimizers that need neither bitsandbytes nor a device that it supports."""


def check_adamw8bit(device: torch.device) -> None:
    """Check that bitsandbytes is installed and can take an 8-bit step on a device, by taking one on a small tensor.

    Raises:
        MissingExtra: bitsandbytes is not installed.
        UsageError: bitsandbytes has no 8-bit optimizer for the device.
    """
    tensor = nn.Parameter(torch.zeros(SMALLEST_8BIT, device=device))
    tensor.grad = torch.ones_like(tensor)
    optimizer = adamw8bit([{"params": [tensor]}], 1e-3)
    try:
        optimizer.step()
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as cause:  # differs by device and version
        raise UsageError(
            f"optimizer adamw8bit is not available on {device.type} with the installed bitsandbytes ({cause}); use "
            f"--optimizer {' or '.join(INSTEAD)}, or another --device.",
            what="adamw8bit",
            where=device.type,
            field="optimizer",
            allowed=INSTEAD,
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
        raise MissingExtra(text, what="bitsandbytes", field="optimizer", allowed=INSTEAD) from cause
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate, weight_decay=0.0)
    optimizer.register_step_post_hook(_note_writes)
    return optimizer


def _note_writes(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Increment the versions of the updated tensors, because bitsandbytes writes to them without autograd noticing."""
    for group in optimizer.param_groups:
        increment_version([parameter for parameter in group["params"] if parameter.grad is not None])
