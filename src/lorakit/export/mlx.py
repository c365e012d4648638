"""The common form as mlx-lm reads it: `adapters.safetensors` with A and B transposed, and its `adapter_config.json`.

mlx-lm adapts the modules that `keys` name, by paths below each of the last `num_layers` layers or by full paths. A
module that is named but has no tensors gets a zero update.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import Tensor

from lorakit.config import CONFIG_FILE
from lorakit.durable import write_bytes, write_json
from lorakit.errors import AdapterError, UsageError
from lorakit.export.conditions import unread_rope
from lorakit.export.facts import base_facts
from lorakit.export.request import Exported, ExportRequest, versioned
from lorakit.export.rules import REMEDIES
from lorakit.tables import format_some

if TYPE_CHECKING:
    from lorakit.architectures.shapes import ModelShape
    from lorakit.core import CommonAdapter

MLX_WEIGHTS = "adapters.safetensors"

ROOTS: Mapping[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"), "model."),
    "gpt2": "transformer.",
}
"""`model_type` of an architecture that was tested in mlx-lm -> start of the paths that are below `model.` there."""

_IN_LAYER = re.compile(r"model\.(?:layers|h)\.(\d+)\.(.+)")


def write_mlx(request: ExportRequest, folder: Path) -> Exported:
    """Write an adapter for mlx-lm to an empty directory.

    Raises:
        AdapterError: The adapter has sites that mlx-lm cannot adapt, or waits for tokens (aLoRA).
        UsageError: The architecture was not tested.

    Source:
        mlx_lm/tuner/utils.py and mlx_lm/tuner/lora.py (0.32.2).
    """
    assert request.base is not None
    adapter, base = request.adapter, base_facts(request.base)
    shape = base.shape
    if shape.model_type not in ROOTS and not request.allow_untested:
        text = (
            f"{request.base.given}: mlx-lm was tested with {', '.join(sorted(ROOTS))}, not with {shape.model_type!r}; "
            "pass --untested-architecture to export nevertheless."
        )
        raise UsageError(text, what=shape.model_type, where=request.base.given, field="untested_architecture")
    _check_sites(adapter, shape)
    root = ROOTS.get(shape.model_type, "model.")
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
    name, served = versioned(request.name, folder), request.served_base or request.base.recorded_name
    unread = unread_rope(base)
    notes = (f"{request.base.given}: {unread}, which mlx-lm does not read: {REMEDIES['theta']}.",) if unread else ()
    return Exported(name, mlx_commands(name, served, adapter.rank), notes)


def mlx_commands(name: str, base: str, rank: int, output: str = "OUTPUT") -> Mapping[str, str]:
    """Return how mlx-lm loads an exported adapter: title -> command."""
    options = f"--model {shlex.quote(base)} --adapter-path {shlex.quote(output)}"
    return {
        "mlx-lm": f"mlx_lm.generate {options} --prompt 'PROMPT'",
        "mlx-lm, server": f"mlx_lm.server {options} --host 127.0.0.1",
    }


def _check_sites(adapter: CommonAdapter, shape: ModelShape) -> None:
    """Reject an adapter with sites that mlx-lm cannot adapt, naming them."""
    if adapter.invocation:
        text = f"{adapter.folder}: mlx-lm cannot run adapters that wait for tokens (aLoRA); export it as gguf."
        raise AdapterError(text, what="aLoRA", where=adapter.folder)
    sites = {site.path: site for site in shape.sites}
    tied = {path for site in shape.sites if site.tied_to for path in (site.path, site.tied_to)}
    problems = dict[str, list[str]]()
    for path, factor in adapter.weights.factors.items():
        site = sites.get(path)
        if factor.bare is not None or site is None:
            problems.setdefault("not a linear layer or embedding of the base", []).append(path)
        elif (factor.B.shape[0], *factor.A.shape[1:]) != (site.out_features, site.in_features):
            problems.setdefault(f"not of the shape that {shape.source} has", []).append(path)
        elif path in tied:
            problems.setdefault("tied embeddings, where mlx-lm adapts the output too", []).append(path)
    if problems:
        found = "; ".join(f"{format_some(paths)}: {problem}" for problem, paths in problems.items())
        text = f"{adapter.folder}: mlx-lm cannot adapt {found}. Merge the adapter (lorakit merge)."
        raise AdapterError(text, what=next(iter(problems.values()))[0], where=adapter.folder)
