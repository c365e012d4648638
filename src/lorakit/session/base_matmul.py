"""The int8 matmuls of a session's base: with the input scales of the run that trained an adapter, or calibrated.

This module does not depend on training; a run's own base is in `lorakit.train.setup.run_int8`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn

from lorakit import core, durable
from lorakit.choices import MATMUL_IN_DTYPE, MATMUL_IN_INT8
from lorakit.errors import UsageError
from lorakit.ops.int8 import why_no_int8_matmuls
from lorakit.report import INT8_FILE
from lorakit.tables import format_bytes, format_count

_MAX_BYTES = 1 << 30


def unsupported(device: torch.device) -> str:
    """Return why int8 matmuls cannot be used on a device of this machine, or "" if they can."""
    if device.type != "cpu":
        return f"they run on a CPU only, and the device is {device}"
    return why_no_int8_matmuls()


def quantize_for_int8(
    model: nn.Module, adapters: Sequence[core.AdapterFiles], calibration: Sequence[Sequence[int]], device: torch.device
) -> tuple[str, str]:
    """Quantize a base for int8 matmuls, if the device supports them.

    `calibration` has the token ids of texts such as the prompts, used if no run directory has input scales. Return how
    the base is multiplied, "int8" or "dtype", and a message that says so.

    Raises:
        UsageError: There are no texts and no run directory with input scales.
        LorakitError: The base cannot be quantized, or the input scales are for another base.
    """
    why = unsupported(device)
    if why:
        return MATMUL_IN_DTYPE, f"Base matmuls: in the dtype of the base, not in int8, because {why}."
    recorded = next(filter(None, map(_scales_of_run, adapters)), None)
    if recorded is None:
        if not calibration:
            text = "base_matmul 'int8' needs texts to choose its input scales; pass calibration=[...], such as prompts."
            raise UsageError(text, what=MATMUL_IN_INT8, field="calibration")
        model.requires_grad_(False)
        base = core.quantize_base(model, [{"input_ids": torch.tensor([ids], device=device)} for ids in calibration])
        sizes = f"{format_bytes(base.bytes_before)} → {format_bytes(base.bytes_after)}"
        layers, source = len(base.paths), f"calibrated on the prompts ({base.tokens:,} tokens); base {sizes}"
    else:
        path, scales = recorded
        core.quantize_with_scales(model, scales)
        layers, source = _layers(scales), f"with the input scales in {path}"
    return MATMUL_IN_INT8, f"Base matmuls: int8 in {format_count(layers, 'layer')}, {source}."


def _scales_of_run(adapter: core.AdapterFiles) -> tuple[Path, dict[str, Tensor]] | None:
    """Return the file with the input scales of the run that trained an adapter, and its tensors, or None.

    The adapter's metadata has the hash of the file, which is next to the adapter in the run directory.
    """
    recorded = durable.as_object(durable.as_object(adapter.sidecar.facts.get("training")).get("base_matmul"))
    path = Path(adapter.folder).parent / INT8_FILE
    if not recorded or not path.is_file():
        return None
    data = durable.read_bytes(path, _MAX_BYTES)
    return (path, tensors_from_bytes(data)) if durable.sha256_bytes(data) == recorded.get("scales_sha256") else None


def _layers(scales: Mapping[str, Tensor]) -> int:
    """Return the number of layers in the result of `core.int8_scales`, which has two tensors per group of layers."""
    return sum(len(name.split(",")) for name in scales) // 2
