"""Loss scaling for a base in fp16, whose smallest number above zero is 6e-8 and whose largest is 65,504.

Gradients pass through fp16 activations on every device, so small ones would be rounded to zero. The loss is therefore
multiplied by a scale before the backward pass, and the gradients of the factors, which are fp32, are divided by it. A
step whose gradients overflow is skipped, and the scale is halved; after 2,000 steps without overflow, it is doubled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorakit.errors import ConfigError, NonFiniteError
from lorakit.train.loop.optimizer import Named

HALF = "float16"
"""The dtype of a base whose loss is scaled."""

ADVICE = (
    " float16 has no numbers above 65,504, so activations or weights of this model may have overflowed. Use --dtype "
    "bfloat16 or --dtype float32, or try a lower --learning-rate."
)
"""Advice for a loss or an output that is not finite on an fp16 base."""

LEAST_SCALE = 1.0
"""The smallest loss scale at which a gradient may overflow; a smaller one would make gradients smaller."""


def loss_scaler(
    device: torch.device, dtype: str, state: Mapping[str, float] | None = None
) -> torch.amp.GradScaler | None:
    """Return the scaler of a run's loss, or None if the base is not in fp16.

    Args:
        device: The run's device.
        dtype: Precision of the base.
        state: The scaler's state in a checkpoint, from `scaler_state`; None or empty for a new run.
    """
    if dtype != HALF:
        return None
    scaler = torch.amp.GradScaler(device.type)
    if state:
        scaler.load_state_dict(dict(state))
    return scaler


def scaler_state(scaler: torch.amp.GradScaler | None) -> dict[str, float]:
    """Return a scaler's state as plain JSON values; empty without a scaler.

    Args:
        scaler: Result of `loss_scaler`.
    """
    return {} if scaler is None else scaler.state_dict()


def check_trained_in_fp32(dtype: str, count: int, field: str = "dtype") -> None:
    """Check that no parameter of a run is trained in fp16, in which the moments of AdamW would be rounded to zero.

    Args:
        dtype: Precision of the base.
        count: Number of parameters that are trained in the dtype of the base: saved modules and biases.
        field: The setting to report.

    Raises:
        ConfigError: The dtype is float16 and `count` is above 0.
    """
    if dtype == HALF and count:
        raise ConfigError(
            f"dtype is 'float16', but {count:,} parameters of saved modules, heads or biases would be trained in it, "
            "and their updates would be rounded to zero. Use --dtype bfloat16 or --dtype float32, or train only A and "
            "B (without modules_to_save and bias).",
            what=HALF,
            field=field,
            allowed=("auto", "bfloat16", "float32"),
        )


def check_named_in_fp32(named: Named, dtype: str) -> None:
    """Check that no trainable tensor is in fp16.

    Args:
        named: (name, tensor) pairs for the trainable tensors (any shape).
        dtype: Precision of the base.

    Raises:
        ConfigError: The dtype is float16, and a tensor has this dtype.
    """
    check_trained_in_fp32(dtype, sum(p.numel() for _, p in named if p.dtype == torch.float16))


def check_scale(scaler: torch.amp.GradScaler, value: float) -> None:
    """Check that a lower loss scale can prevent the overflow of a gradient.

    Args:
        scaler: The scaler, before it is updated.
        value: The norm of the gradient, which is not finite.

    Raises:
        NonFiniteError: The scale is already `LEAST_SCALE` or less.
    """
    if scaler.get_scale() <= LEAST_SCALE:
        raise NonFiniteError(
            f"the gradient norm became {value} with the loss scale {scaler.get_scale():g}; the step was not taken.",
            what="gradient norm",
        )
