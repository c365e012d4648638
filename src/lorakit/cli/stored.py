"""Says so where adapters are used on a base that is stored in another way than the one they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.cli import console
from lorakit.plan.quantized import Quantization

if TYPE_CHECKING:
    from lorakit.core.files.adapter_folder import AdapterFiles


def say_how_trained(adapters: Sequence[AdapterFiles], wanted: Quantization | None) -> None:
    """Print a line for each adapter whose base was stored otherwise; it works here, a little less exactly.

    Args:
        adapters: The adapters.
        wanted: How the base is stored now, or None for as it is.
    """
    now = "as it is" if wanted is None else f"as {wanted.name}"
    for files in adapters:
        training = files.sidecar.facts.get("training")
        stored = training.get("quantization") if isinstance(training, dict) else None
        method = stored.get("method") if isinstance(stored, dict) else None
        if method is not None and (wanted is None or method != wanted.name):
            console.note(
                f"{files.folder}: trained on a base stored as {method}, which is {now} here; --quantization {method} "
                "gives the numbers that it was trained on."
            )
