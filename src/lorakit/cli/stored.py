"""Report adapters that are used on a base with another quantization than in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.cli import console
from lorakit.plan.quantized import Quantization

if TYPE_CHECKING:
    from lorakit.core.files.adapter_folder import AdapterFiles


def report_training_quantization(adapters: Sequence[AdapterFiles], wanted: Quantization | None) -> None:
    """Print a line for each adapter whose base was quantized differently; it works here, a little less exactly.

    Args:
        adapters: The adapters.
        wanted: Quantization of the base now, or None.
    """
    now = "not quantized" if wanted is None else f"quantized as {wanted.name}"
    for files in adapters:
        training = files.sidecar.facts.get("training")
        stored = training.get("quantization") if isinstance(training, dict) else None
        method = stored.get("method") if isinstance(stored, dict) else None
        if method is not None and (wanted is None or method != wanted.name):
            console.note(
                f"{files.folder}: trained on a base quantized as {method}, which is {now} here; "
                f"--quantization {method} gives the weights of training."
            )
