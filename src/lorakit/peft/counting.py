"""How many numbers of a model are trained, and the line that people of the field know."""

from __future__ import annotations

from torch import nn


class Counted(nn.Module):
    """A module that says how much of it is trained."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable numbers, and all numbers of the model with its adapters."""
        numbers = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in numbers if trained), sum(n for n, _ in numbers)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line: the share is of all parameters, adapters included."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
