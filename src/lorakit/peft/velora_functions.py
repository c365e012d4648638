"""PEFT's functions for VeLoRA's compressed inputs, based on `lorakit.core.variants.velora`."""

from __future__ import annotations

from torch import Tensor

from lorakit.core.variants.velora import compressed_linear


def reconstructed(compressed: Tensor, embed: Tensor, in_features: int, velora_scale: float) -> Tensor:
    """Return the input that the gradient of A uses instead of the original input.

    Args:
        compressed: Length of each group along the projection, (rows, n).
        embed: Projection of unit length, (d,).
        in_features: Input width; the padding of the last group is removed.
        velora_scale: Factor σ of the result.

    Returns:
        (rows, in_features).
    """
    return (compressed[..., None] * embed).flatten(1)[:, :in_features] * velora_scale


class VeloraFunction:
    """A linear map whose backward pass reads the compressed input."""

    @staticmethod
    def apply(
        input: Tensor, weight: Tensor, bias: Tensor | None, embed: Tensor, num_groups: int, velora_scale: float
    ) -> Tensor:
        """Return input·weightᵀ + bias, (…, out); the gradient of the weight comes from the compressed input.

        Args:
            input: Input rows, (…, in).
            weight: (out, in).
            bias: (out,), or None.
            embed: Projection of unit length, (d,).
            num_groups: Number of groups.
            velora_scale: Factor σ of the weight's gradient.
        """
        output = compressed_linear(input, weight, embed, num_groups, velora_scale)
        return output if bias is None else output + bias
