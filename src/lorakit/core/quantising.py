"""A dense layer in fewer bits: which quantiser makes which of the words of `--quantization`.

For models that transformers does not load, and for storages that it cannot. Knows nothing of adapters.
"""

from __future__ import annotations

from torch import nn

from lorakit.core.bases.bitsandbytes import eight_bit_linear, four_bit_linear
from lorakit.core.bases.hqq import hqq_linear
from lorakit.core.bases.torchao import int8_linear
from lorakit.plan.quantised import BLOCK, Quantization


def quantised_linear(linear: nn.Linear, wanted: Quantization) -> nn.Module:
    """A dense layer as a quantiser stores it.

    Args:
        linear: The layer; its dtype becomes that of the products. Its weight may be given up.
        wanted: How to store it.

    Returns:
        The layer to put in its place, in the same mode, frozen.
    """
    package, bits = wanted.storage.package, wanted.storage.bits
    if package == "hqq":
        return hqq_linear(linear, bits, BLOCK)
    if package == "torchao":
        return int8_linear(linear)
    if bits == 8:
        return eight_bit_linear(linear)
    return four_bit_linear(linear, wanted.name, wanted.double)
