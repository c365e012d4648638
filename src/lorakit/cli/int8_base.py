"""Quantize the base of a command that runs a model, for int8 matmuls (`--base-matmul int8`).

The input scales are those of the run that trained an adapter, if its directory has them. Otherwise, they are calibrated
on the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli import console
from lorakit.plan.job import BASE_MATMULS
from lorakit.tables import format_bytes, format_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lorakit.core import AdapterFiles

DTYPE, INT8 = BASE_MATMULS

_MAX_BYTES = 1 << 30


def is_multiplied_in_int8(base_matmul: str, device: torch.device) -> bool:
    """Return whether a base will be multiplied in int8: if the user asked for it, and the device supports it."""
    if base_matmul != INT8:
        return False
    from lorakit.train.int8_base import unsupported

    return not unsupported(device)


def quantize_for_int8(
    model: nn.Module, adapters: Sequence[AdapterFiles], prompts: Sequence[Sequence[int]], device: torch.device
) -> str:
    """Quantize a base for int8 matmuls and report it, or report why the device does not support them.

    Args:
        model: The model with its adapters, changed in place.
        adapters: Files of the adapters.
        prompts: Token ids of each prompt, for the calibration.
        device: Device of the model.

    Returns:
        How the base is multiplied: "int8" or "dtype".

    Raises:
        LorakitError: The base cannot be quantized, or the input scales are for another base.
    """
    import torch

    from lorakit import core
    from lorakit.train.int8_base import unsupported

    why = unsupported(device)
    if why:
        console.note(f"Base matmuls: in the dtype of the base, not in int8, because {why}.")
        return DTYPE
    found = next(filter(None, map(_scales_of_run, adapters)), None)
    if found is None:
        model.requires_grad_(False)
        base = core.quantize_base(model, [{"input_ids": torch.tensor([ids], device=device)} for ids in prompts])
        sizes = f"{format_bytes(base.bytes_before)} → {format_bytes(base.bytes_after)}"
        layers, source = len(base.paths), f"calibrated on the prompts ({base.tokens:,} tokens); base {sizes}"
    else:
        path, scales = found
        core.quantize_with_scales(model, scales)
        layers, source = _layers(scales), f"with the input scales in {path}"
    console.note(f"Base matmuls: int8 in {format_count(layers, 'layer')}, {source}.")
    return INT8


def _scales_of_run(adapter: AdapterFiles) -> tuple[Path, dict[str, Tensor]] | None:
    """Return the file with the input scales of the run that trained an adapter, and its tensors, or None.

    The adapter's metadata has the hash of the file, which is next to the adapter in the run directory.
    """
    from safetensors.torch import load

    from lorakit import durable
    from lorakit.train.run_folder import INT8_FILE

    training = adapter.sidecar.facts.get("training")
    recorded = training.get("base_matmul") if isinstance(training, Mapping) else None
    path = Path(adapter.folder).parent / INT8_FILE
    if not isinstance(recorded, Mapping) or not path.is_file():
        return None
    data = durable.read_bytes(path, _MAX_BYTES)
    return (path, load(data)) if durable.sha256_bytes(data) == recorded.get("scales_sha256") else None


def _layers(scales: Mapping[str, Tensor]) -> int:
    """Return the number of layers in the result of `core.int8_scales`, which has two tensors per group of layers."""
    return sum(len(name.split(",")) for name in scales) // 2
