"""Model directories with quantized files, in the layouts in which such models are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.quantization.fp8 import Fp8Layout, Fp8Linear
from lorakit.core.quantization.packed import PackedLinear, packed_linear

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


def fp8_linear(linear: nn.Linear, block: tuple[int, int] | None) -> PackedLinear:
    """Return a frozen fp8 copy of a dense layer, with a scale per block (rows, columns); None is one scale for all."""
    weight = linear.weight.detach().float()
    rows, columns = weight.shape
    shape = () if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    values, scales = Fp8Layout(rows, columns, block).encode(weight, torch.ones(shape, device=weight.device))
    parts = {"weight": values, "weight_scale_inv": scales}
    return packed_linear(Fp8Linear, linear, parts, {"block_size": block})


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


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (n, …) along the first axis, as one stream of bits, lowest first; in Python integers."""
    streams = codes.reshape(codes.shape[0], -1).T.tolist()
    packed = []
    for stream in streams:
        whole = sum(code << (bits * place) for place, code in enumerate(stream))
        words = [(whole >> (32 * place)) & 0xFFFFFFFF for place in range(-(-len(stream) * bits // 32))]
        packed.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(packed, dtype=torch.int32).T.reshape(-1, *codes.shape[1:]).contiguous()


def gptq_tensors(
    rows: int, columns: int, bits: int, group: int, *, shuffled: bool = False, version: int = 1, indexed: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Return random tensors in the layout of AutoGPTQ, and the weight (rows, columns) that they define."""
    size = columns if group == -1 else group
    groups = columns // size
    index = torch.arange(columns) // size
    index = index[torch.randperm(columns)] if shuffled else index
    codes = torch.randint(0, 2**bits, (columns, rows))
    zeros = torch.randint(1, 2**bits, (groups, rows))  # files of version 1 store zero - 1, which is at least 0
    scales = (torch.rand(groups, rows) * 0.02 + 0.001).half()
    weight = torch.empty(rows, columns)
    for column in range(columns):
        of = int(index[column])
        weight[:, column] = (codes[column] - zeros[of]).float() * scales[of].float()
    parts = {
        "qweight": _words(codes, bits),
        "qzeros": _words((zeros - (2 - version)).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": index.int(),
    }
    return {name: part for name, part in parts.items() if indexed or name != "g_idx"}, weight


def awq_tensors(rows: int, columns: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return random tensors in the layout of AutoAWQ ("gemm"), and the weight (rows, columns) that they define."""
    groups = columns // group
    codes, zeros = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (groups, rows))
    scales = (torch.rand(groups, rows) * 0.02 + 0.001).half()
    weight = torch.empty(rows, columns)
    for column in range(columns):
        of = column // group
        weight[:, column] = (codes[column] - zeros[of]).float() * scales[of].float()

    def packed(numbers: Tensor) -> Tensor:
        words = torch.zeros(numbers.shape[0], rows // 8, dtype=torch.int64)
        for word in range(rows // 8):
            for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, word] |= numbers[:, 8 * word + output] << (4 * nibble)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, weight


COMPRESSED = ("int8-channel", "int8-asymmetric", "int8-group", "fp8-channel", "fp8-tensor", "fp8-block")


def compressed_tensors(rows: int, columns: int, layout: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return random tensors in a layout of compressed-tensors, and the weight (rows, columns) that they define."""
    kind, strategy = layout.split("-")
    height, width = {"group": (1, 16), "block": BLOCK, "tensor": (rows, columns)}.get(strategy, (1, columns))
    scales = torch.rand(-(-rows // height), -(-columns // width)) * 0.002 + 0.0001
    if kind == "int8":
        values = torch.randint(-128, 128, (rows, columns)).to(torch.int8)
    else:
        values = (torch.randn(rows, columns) * 30).to(torch.float8_e4m3fn)
        scales = scales * 0.5
    zeros = torch.randint(-20, 20, scales.shape).to(torch.int8) if strategy == "asymmetric" else None
    at = (torch.arange(rows).unsqueeze(1) // height, torch.arange(columns) // width)
    weight = (values.float() - (0 if zeros is None else zeros[at])) * scales[at]
    parts = {"weight": values, "weight_scale": scales.reshape(1) if strategy == "tensor" else scales}
    return parts if zeros is None else {**parts, "weight_zero_point": zeros}, weight


def write_packed(folder: Path, dense: Any, layout: str) -> Path:
    """Write a model with random packed linear layers; `dense` gets the weights that their format defines.

    The layout is "gptq", "awq" or a name in `COMPRESSED`.
    """
    torch.manual_seed(0)
    tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    for path, module in dense.named_modules():
        if path.endswith(LAYERS):
            rows, columns = module.weight.shape
            if layout == "gptq":
                parts, weight = gptq_tensors(rows, columns, 4, 32, shuffled=True)
            elif layout == "awq":
                parts, weight = awq_tensors(rows, columns, 32)
            else:
                parts, weight = compressed_tensors(rows, columns, layout)
            module.weight.data = weight
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{name}": part for name, part in parts.items()}
    return write(folder, tensors, quantization(layout))


def quantization(layout: str) -> dict[str, Any]:
    """Return the quantization config of a layout of `write_packed`."""
    if layout == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    if layout == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    kind, strategy = layout.split("-")
    weights: dict[str, Any] = {"num_bits": 8, "type": "int" if kind == "int8" else "float"}
    weights |= {"strategy": {"asymmetric": "channel"}.get(strategy, strategy), "symmetric": strategy != "asymmetric"}
    if strategy == "group":
        weights["group_size"] = 16
    if strategy == "block":
        weights["block_structure"] = list(BLOCK)
    form = "int-quantized" if kind == "int8" else "float-quantized"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    common = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return {**common, "config_groups": groups, "ignore": ["lm_head"]}


def losses(model: Any, parameters: list[Any], x: Tensor) -> list[float]:
    """Take three steps of SGD on the mean square of the output, and return the losses before each step."""
    optimizer = torch.optim.SGD(parameters, 1e-3)
    found = []
    for _ in range(3):
        loss = model(x).square().mean()
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found
