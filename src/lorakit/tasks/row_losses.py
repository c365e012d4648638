"""The next-token loss of each row of a padded batch, without the logits of the whole batch.

The head gets only the last position of each row, so that the model's own logits stay small. Its input, the hidden
states, is multiplied by the head's weight row by row. This requires that the logits are the output of the head,
possibly scaled or soft-capped, which is checked with the logits of the last positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data import Batch
from lorakit.data.encoding import IGNORED
from lorakit.errors import NotYetSupported
from lorakit.speed.loss import Head, head_for, output_head, shifted


def row_losses(model: nn.Module, batch: Batch, device: str | torch.device) -> Tensor:
    """Return the next-token cross entropy of each row, summed over the tokens that contribute to the loss.

    Args:
        model: A causal language model, without gradients; unchanged.
        batch: Batch of (rows, length) tensors on the CPU; padding is on the right.
        device: The model's device.

    Returns:
        The losses (rows,), in float32 or wider; up to rounding, `lorakit.tasks.loss_sum` of each row alone.

    Raises:
        NotYetSupported: The logits are not a function of the output of a frozen linear head.
    """
    head = output_head(model)
    if head is None or type(head).forward is not nn.Linear.forward:
        raise _unsupported("its head is not a plain linear module")
    hidden, given = list[Tensor](), list[Tensor]()

    def shorten(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not args or args[0].shape[:-1] != batch.input_ids.shape:
            return args
        hidden.append(args[0])
        return (args[0][:, -1:].contiguous(), *args[1:])  # strides between the rows would copy the weight for each row

    def keep(_: nn.Module, args: object, output: Tensor) -> None:
        given.append(output)

    handles = [head.register_forward_pre_hook(shorten), head.register_forward_hook(keep)]
    try:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        output = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    is_known = len(given) == len(hidden) == 1
    made = head_for(head, given[0] if is_known else None, getattr(output, "logits", None), model)
    if not isinstance(made, Head):
        raise _unsupported(made)
    targets = shifted(batch.labels, IGNORED)
    return torch.stack([made.loss(row, wanted, 1.0, IGNORED) for row, wanted in zip(hidden[0], targets, strict=True)])


def _unsupported(reason: str) -> NotYetSupported:
    return NotYetSupported(f"the losses of rows are computed one row at a time: {reason}.", what=reason, field="batch")
