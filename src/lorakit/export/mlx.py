"""The common form as mlx-lm reads it: `adapters.safetensors` with A and B transposed, and its `adapter_config.json`.

mlx-lm adapts the modules that `keys` name, by paths below each of the last `num_layers` layers or by full paths. A
module that is named but has no tensors gets a zero update.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lorakit.config import CONFIG_FILE
from lorakit.durable import write_bytes, write_json
from lorakit.errors import AdapterError, UsageError
from lorakit.export.conditions import unread_rope
from lorakit.export.request import Exported, ExportRequest, versioned
from lorakit.export.rules import REMEDIES
from lorakit.export.sites import check_sites, tested_base
from lorakit.tables import format_some

MLX_WEIGHTS, HEAD = "adapters.safetensors", "lm_head"

ROOTS: Mapping[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"), "model."),
    "gpt2": "transformer.",
}
"""`model_type` of an architecture that was tested in mlx-lm -> start of the paths that are below `model.` there."""

_IN_LAYER = re.compile(r"model\.(?:layers|h)\.(\d+)\.(.+)")


def write_mlx(request: ExportRequest, folder: Path) -> Exported:
    """Write an adapter for mlx-lm to an empty directory.

    Raises:
        AdapterError: The adapter has sites that mlx-lm cannot adapt.
        UsageError: The architecture was not tested, or mlx-lm cannot read the base.

    Source:
        mlx_lm/tuner/utils.py and mlx_lm/tuner/lora.py (0.32.2).
    """
    adapter, source = request.adapter, request.known_base
    base = tested_base(request, ROOTS, "mlx-lm")
    shape = base.shape
    if source.kind == "gguf" and not request.served_base:
        text = f"{source.given}: mlx-lm reads no GGUF files; pass a directory with the same weights as --served-base."
        raise UsageError(text, where=source.given, field="served_base")
    check_sites(adapter, shape, "mlx-lm")
    root = ROOTS.get(base.model_type, "model.")
    if outside := [path for path in adapter.weights.factors if not path.startswith(root) and path != HEAD]:
        text = f"{adapter.folder}: mlx-lm has no {format_some(outside)}, and would answer without it."
        raise AdapterError(text, what=outside[0], where=adapter.folder)
    tensors, keys, first = dict[str, Tensor](), set[str](), shape.layers
    for path, factor in adapter.weights.factors.items():
        there = f"model.{path.removeprefix(root)}" if path.startswith(root) else path
        tensors |= {f"{there}.lora_a": factor.A.T.contiguous(), f"{there}.lora_b": factor.B.T.contiguous()}
        layer = _IN_LAYER.fullmatch(there)
        keys.add(layer[2] if layer else there)
        first = min(first, int(layer[1])) if layer else first
    write_bytes(folder / MLX_WEIGHTS, save(tensors))
    parameters = {"rank": adapter.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    # with 0 layers, mlx-lm adapts all
    config = {"fine_tune_type": "lora", "num_layers": max(1, shape.layers - first), "lora_parameters": parameters}
    write_json(folder / CONFIG_FILE, config)
    name, served = versioned(request.name, folder), request.served_base or source.recorded_name
    unread = unread_rope(base)
    notes = (f"{source.given}: {unread}, which mlx-lm does not read: {REMEDIES['theta']}.",) if unread else ()
    return Exported(name, served, notes)


def mlx_commands(name: str, base: str, rank: int, output: str) -> Mapping[str, str]:
    """Return how mlx-lm loads an exported adapter: title -> command."""
    options = f"--model {shlex.quote(base)} --adapter-path {shlex.quote(output)}"
    return {
        "mlx-lm": f"mlx_lm.generate {options} --prompt 'PROMPT'",
        "mlx-lm, server": f"mlx_lm.server {options} --host 127.0.0.1",
    }
