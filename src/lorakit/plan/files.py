"""Sizes on disk of what a run writes: the adapter and its checkpoint, compared with the whole model.

Sizes are of the tensors; a safetensors file adds a header of about a hundred bytes per tensor. This module knows no
file names and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.architectures.shapes import ModelShape
from lorakit.plan.job import DTYPE_BYTES
from lorakit.plan.params import Count

MASTER_BYTES = 4
"""Bytes of a trained parameter: adapters are held and saved in fp32."""


@dataclass(frozen=True)
class FileSize:
    """Size of one file.

    Attributes:
        what: Its name.
        formula: How the size is computed.
        size_bytes: The size.
    """

    what: str
    formula: str
    size_bytes: int


def sizes(shape: ModelShape, counted: Count) -> list[FileSize]:
    """Return the sizes on disk of LoRA and of full fine-tuning. [docs/math.md (40)-(43)]

    Args:
        shape: The base.
        counted: The adapter.

    Returns:
        Adapter; adapter with Adam's two moments; model; checkpoint of full fine-tuning in fp32 with two moments.
    """
    trained, held, base = counted.trainable, counted.saved_parameters, shape.parameters
    whole = f"3 × 4 × {trained:,}" if held == trained else f"4 × {held:,} + 2 × 4 × {trained:,}"
    published = DTYPE_BYTES.get(shape.dtype, MASTER_BYTES)
    return [
        FileSize("adapter, fp32", f"4 × {held:,}", MASTER_BYTES * held),
        FileSize("adapter with Adam's two moments", whole, MASTER_BYTES * (held + 2 * trained)),
        FileSize(f"full model, {shape.dtype}", f"{published} × {base:,}", published * base),
        FileSize("full checkpoint with Adam's two moments", f"3 × 4 × {base:,}", 3 * MASTER_BYTES * base),
    ]
