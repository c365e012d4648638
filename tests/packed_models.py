"""Model directories with quantized files, in the layouts in which such models are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.core.quantization.fp8 import fp8_linear

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = (16, 32)


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    """Replace the weights of a model directory, and add a quantization to its config."""
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_fp8(folder: Path, dense: Any) -> Path:
    """Write a model as DeepSeek does, with fp8 values and block scales; `dense` gets the dequantized weights."""
    tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    for path, module in dense.named_modules():
        if path.endswith(LAYERS):
            packed = fp8_linear(module, BLOCK)
            tensors |= {f"{path}.weight": packed.weight.data, f"{path}.weight_scale_inv": packed.weight_scale_inv.data}
            module.weight.data = packed.packed().decoded()
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return write(folder, tensors, quantization)
