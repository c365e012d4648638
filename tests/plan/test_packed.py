"""Plans for models whose files are quantized: bytes of weights, from the config alone, compared with loaded models."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import hub, plan
from lorakit.config import LoraConfig
from lorakit.core import AwqLinear, CompressedLinear, GptqLinear, packed_linear
from lorakit.errors import ConfigError
from lorakit.plan import Job, memory
from lorakit.plan.packed import packed_files, stored_base
from lorakit.plan.quantized import StoredBase

from .. import packed_models, small_models

CONFIG = LoraConfig(r=4, target_modules="all-linear")
EVERY = ("gptq", "awq", *packed_models.COMPRESSED, "fp8")


@pytest.fixture
def dense(wide_model_directory: Path) -> Any:
    return hub.load_model(wide_model_directory, "float32")


def written(layout: str, folder: Path, dense: Any) -> Path:
    if layout == "fp8":
        return packed_models.write_fp8(folder, dense)
    return packed_models.write_packed(folder, dense, layout)


def held_bytes(model: Any) -> int:
    """Return the size of all parameters, each storage counted once."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters() if tensor.numel()}
    return sum(held.values())


@pytest.mark.parametrize("layout", EVERY)
def test_the_plan_counts_the_bytes_of_a_packed_model(layout: str, wide_model_directory: Path, dense: Any) -> None:
    folder = written(layout, wide_model_directory, dense)
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    moved = weights.rename(folder / "hidden")  # the plan reads only the config
    shape = hub.shape_of(folder)
    moved.rename(weights)
    files = packed_files(shape)
    assert files is not None and files.base is not None and len(files.base.sites) == 14
    model = hub.load_model(folder, "float32")
    planned = plan.estimate(shape, CONFIG, Job(dtype="float32", accelerated=True))
    assert planned.lora.memory.bytes_of("weights") == held_bytes(model)
    assert files.file_bytes == pytest.approx(weights.stat().st_size - 8 - header, rel=0.001)
    assert any(note.startswith(f"{files.method}: every matmul dequantizes") for note in planned.notes)
    plain = plan.estimate(dataclasses.replace(shape, quantization={}), CONFIG, Job(dtype="float32"))
    assert planned.lora.memory.bytes_of("weights") < plain.lora.memory.bytes_of("weights")


def test_modules_that_the_config_leaves_out_are_dense(wide_model_directory: Path, dense: Any) -> None:
    shape = hub.shape_of(packed_models.write_packed(wide_model_directory, dense, "int8-channel"))
    values = dict(shape.quantization)

    def left(*names: str) -> set[str]:
        files = packed_files(dataclasses.replace(shape, quantization={**values, "ignore": list(names)}))
        assert files is not None and files.base is not None
        return {site.path for site in shape.sites if site.dense} - {site.path for site in files.base.sites}

    down = {f"model.layers.{number}.mlp.down_proj" for number in range(2)}
    assert left() == left("lm_head") == left("down") == set()
    assert left("model.layers.1.mlp.down_proj") == {"model.layers.1.mlp.down_proj"}
    assert left("re:.*down_proj") == left("re:.*\\.down_proj$") == left("down_proj") == down
    assert left("re:model.layers.*.mlp.*down_proj") == down


def test_a_pattern_that_is_not_evaluated_is_reported(wide_model_directory: Path, dense: Any) -> None:
    shape = hub.shape_of(packed_models.write_packed(wide_model_directory, dense, "int8-channel"))
    values = {**shape.quantization, "ignore": ["re:.*(up|down)_proj"]}
    planned = plan.estimate(dataclasses.replace(shape, quantization=values), CONFIG, Job(dtype="float32"))
    assert any("re:.*(up|down)_proj" in note for note in planned.notes)


def test_packed_files_are_not_quantized_again(wide_model_directory: Path, dense: Any) -> None:
    shape = hub.shape_of(packed_models.write_packed(wide_model_directory, dense, "gptq"))
    with pytest.raises(ConfigError, match=r"already quantized \(gptq\)") as caught:
        plan.estimate(shape, CONFIG, Job(dtype="float32", quantization="nf4"))
    assert caught.value.field == "quantization"


def test_other_methods_are_not_packed(wide_model_directory: Path) -> None:
    shape = hub.shape_of(wide_model_directory)
    assert packed_files(shape) is None and stored_base(shape, None, 4, True) is None
    bnb = dataclasses.replace(shape, quantization={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert packed_files(bnb) is None and isinstance(stored_base(bnb, "nf4", 4, True), StoredBase)


def test_mxfp4_files_are_mapped_while_they_are_dequantized(tmp_path: Path) -> None:
    from transformers import GptOssConfig

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = GptOssConfig(**sizes, **heads, dtype="float32").to_dict()
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "architectures": ["GptOssForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = hub.shape_of(tmp_path / "config.json")
    files = packed_files(shape)
    in_experts = 3 * (64 * 64 + 32 * 64)
    assert files is not None and files.base is None
    assert files.file_bytes == in_experts // 2 + in_experts // 32 + 4 * (shape.parameters - in_experts)
    planned = plan.estimate(shape, LoraConfig(r=2, target_modules=["q_proj"]), Job(dtype="float32"))
    assert planned.lora.memory.bytes_of("weights") == 4 * shape.parameters
    assert memory.temporary_bytes(shape, None, Job(dtype="float32"))[memory.LOADING] == files.file_bytes
    assert any("dequantized while they are loaded" in note for note in planned.notes)


def test_fp8_files_with_experts_are_dequantized() -> None:
    model = small_models.mixtral()
    shape = hub.shape_of_module(model, "mixtral", "here")
    shape = dataclasses.replace(shape, quantization={"quant_method": "fp8", "weight_block_size": [16, 16]})
    files = packed_files(shape)
    assert files is not None and files.base is None and files.file_bytes < 2 * shape.parameters


class Peak(TorchDispatchMode):
    """Within the block: the largest number of bytes in tensors that operations made and that existed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._made.append(weakref.ref(result))
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
        self.bytes = max(self.bytes, sum(storages.values()))
        return result


@pytest.mark.parametrize(
    ("layout", "bits"), [("gptq", 4), ("gptq", 3), ("awq", 4), ("int8-group", 8), ("fp8-block", 8)]
)
def test_the_bytes_that_exist_while_a_weight_is_dequantized(layout: str, bits: int) -> None:
    rows, columns = 128, 512
    linear, values = torch.nn.Linear(columns, rows, bias=False), dict(packed_models.quantization(layout))
    kind = {"gptq": GptqLinear, "awq": AwqLinear}.get(layout, CompressedLinear)
    settings: dict[str, Any] = {"block": packed_models.BLOCK if layout == "fp8-block" else None}
    if layout == "gptq":
        parts, _ = packed_models.gptq_tensors(rows, columns, bits, 128)
        settings, values["bits"] = {"bits": bits, "offset": 1}, bits
    elif layout == "awq":
        parts, _ = packed_models.awq_tensors(rows, columns, 128)
    else:
        parts, _ = packed_models.compressed_tensors(rows, columns, layout)
    with Peak() as peak:
        packed_linear(kind, linear, parts, settings).packed().decoded().to(torch.bfloat16)
    model = small_models.llama()
    files = packed_files(dataclasses.replace(hub.shape_of_module(model, "llama", "here"), quantization=values))
    assert files is not None and files.base is not None
    assert peak.bytes / (rows * columns) == pytest.approx(files.base.storage.decode_bytes, rel=0.12)
