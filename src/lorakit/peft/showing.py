"""What a wrapper says of itself: how much is trained, the status of its layers, its card."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from lorakit.peft import status
from lorakit.peft.cards import write_card


class Shown(nn.Module):
    """A wrapper that says what stands on its model."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable numbers, and all numbers of the model with its adapters."""
        numbers = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in numbers if trained), sum(n for n, _ in numbers)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line: the share is of all parameters, adapters included."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The status of every adapted layer; see `status.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The status of the model; see `status.get_model_status`."""
        return status.get_model_status(self)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write `README.md` beside an adapter, or put into one that is there what it lacks.

        Args:
            output_dir: The folder.
        """
        write_card(self, Path(output_dir))
